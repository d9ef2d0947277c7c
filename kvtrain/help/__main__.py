"""Writes the pages that follow from the code."""

from kvtrain.help import DOCS, FOLDER, PAGE, documents, generated_pages

for name, text in generated_pages().items():
    (FOLDER / f"{name}.txt").write_text(text)
for name, text in (documents() if (DOCS / PAGE).is_file() else {}).items():
    (DOCS / name).write_text(text, encoding="utf-8")
