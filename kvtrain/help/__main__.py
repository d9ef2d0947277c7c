"""Writes the pages that follow from the code."""

from kvtrain.help import FOLDER, generated_pages

for name, text in generated_pages().items():
    (FOLDER / f"{name}.txt").write_text(text)
