"""Step `texts`: fetch the texts of `evaluation.texts` from the Hub, so that what was evaluated on is identified."""

import json

from numprune.files import replace_on_success
from numprune.texts import describe, read_text
from tasks.layout import TEXTS_FOLDER
from tasks.parameters import load_parameters
from tasks.step import run_step


def fetch_texts() -> None:
    """Writes the documents of every text as `data/texts/NAME.jsonl`, and where they come from as `origin.json`."""
    names = load_parameters().evaluation.texts
    with replace_on_success(TEXTS_FOLDER) as folder:
        folder.mkdir()
        for name in names:
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": document}) + "\n" for document in read_text(name))
        origins = {name: describe(name) for name in names}
        (folder / "origin.json").write_text(json.dumps(origins, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_step(fetch_texts)
