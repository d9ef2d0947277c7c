import sys
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    from kvtrain.training.cli import main as run
    run(argv)
if __name__ == "__main__":
    main()
