"""Chats that cannot be read or learned, and templates that cannot be used."""

# Behind `kvtrain prepare` with a tokenizer, a template and an output.
PREPARE = [
    ("--chats nope", "nope: no such file or folder"),
    ("--chats emptydir", "emptydir: the folder holds no .jsonl, .parquet file"),
    ("--chats chats/plain.txt", "chats/plain.txt: cannot read '.txt' files; convert to .jsonl, .parquet, .json"),
    (
        "--chats chats/column.jsonl",
        "chats/column.jsonl row 1: no 'messages', 'conversations', or 'prompt' with 'completion'",
    ),
    (
        "--chats chats/good.jsonl --messages-column talk",
        "no column 'talk'; the columns are 'prompt', 'completion'; set mess",
    ),
    ("--chats chats/silent.jsonl", "chats/silent.jsonl row 1: no turn of the assistant"),
    ("--chats chats/order.jsonl", "chats/order.jsonl row 2: message 1 of role 'assistant' opens the chat"),
    ("--chats chats/robot.jsonl", "chats/robot.jsonl row 1: message 1 has the role 'robot'; it must be one of system,"),
    ("--chats chats/number.jsonl", "chats/number.jsonl row 1: message 2: its content is int, not text"),
    ("--chats chats/cut.jsonl", "chats/cut.jsonl row 2: not JSON"),
    ("--chats chats/empty.jsonl", "chats/empty.jsonl: no chats; write one a line"),
    ("--chats chats/one.json", "chats/one.json: holds one dict, not a list of chats"),
    ("--chats chats/bad.parquet", "chats/bad.parquet: not a readable parquet file"),
    ("--chats chats/good.jsonl --output emptydir", "emptydir exists already"),
    ("--chats chats/good.jsonl --corpus train.jsonl", "give text as --corpus, or chats as --chats, not both"),
    ("--chats chats/good.jsonl --train-tokenizer 300", "--train-tokenizer learns from text"),
    (
        "--chats chats/good.jsonl --text-column body",
        "--text-column is for --corpus; a chat's field is --messages-column",
    ),
    ("--corpus train.jsonl", "--chat-template is for --chats"),
    ("--chats chats/good.jsonl --template-arguments x", "'x' is not JSON"),
    ("--chats chats/good.jsonl --template-arguments [1]", "'[1]' is not a JSON object"),
    (
        "--chats chats/good.jsonl --chat-template nope.jinja",
        "nope.jinja: No such file or directory; a chat template is given as text",
    ),
    ("--chats chats/good.jsonl --chat-template bad.jinja", "chats/good.jsonl row 1: the chat template fails on it"),
    (
        "--chats chats/good.jsonl --chat-template chats/refuses.jinja",
        "row 1: the chat template fails on it (only on Sundays)",
    ),
    (
        "--chats chats/good.jsonl --chat-template chats/hides.jinja",
        "row 1: answer 1: the chat template writes nothing for",
    ),
    (
        "--chats chats/good.jsonl --chat-template chats/thinks.jinja",
        "What is 0?[assistant]' the generation prompt writes '<think>' and the answer 'A number.'",
    ),
]

# Behind `kvtrain fit --config chat.yaml`.
DATA = [
    ("--data.init_args.chats ''", "chats is empty; name a file, a folder, hf:org/name, or examples"),
    ("--data.init_args.chats nope", "nope: no such file or folder"),
    (
        "--data.init_args.chats chats/order.jsonl",
        "chats/order.jsonl row 2: message 1 of role 'assistant' opens the chat",
    ),
    ("--data.init_args.validation_chats chats/silent.jsonl", "chats/silent.jsonl row 1: no turn of the assistant"),
    (
        "--data.init_args.chat_template null",
        "the tokenizer has no chat template; give one, or its file, as data.chat_template of",
    ),
    ("--data.init_args.chat_template nope.jinja", "nope.jinja: No such file or directory"),
    ("--data.init_args.chat_template chats/refuses.jinja", "the chat template fails on it (only on Sundays)"),
    ("--data.init_args.validation_share 1", "validation_share is a share, above 0 and below 1, not 1.0"),
    ("--data.init_args.validation_share 0.001", "validation_share 0.001 holds 0 of 40 different chats out; change it"),
    ("--data.init_args.too_long split", "too_long"),
    ("--data.init_args.sequence_length 4", "no chat fits into 4 tokens; raise sequence_length"),
    ("--data.init_args.batch_size 100", "rows, fewer than one optimizer step takes"),
    ("--data.init_args.sequence_lenght 64", "unknown option 'data.sequence_lenght'"),
    ("--data.init_args.tokenizer kvtrain:tiny", "set data.tokenizer"),
]
