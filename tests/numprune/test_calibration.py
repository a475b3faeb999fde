import json

import pytest
import torch
from safetensors.torch import save_file

from numprune.calibration import draw_samples, evaluation_windows
from numprune.errors import NumpruneError
from numprune.samples import Samples, fingerprint, load_samples, save_samples


@pytest.fixture
def folder(make_checkpoint):
    return str(make_checkpoint())


def test_text_is_cut_into_windows_and_drawn_by_seed(folder, text_file):
    drawn = draw_samples(str(text_file), folder, samples=8, length=16, seed=3)
    assert drawn.input_ids.shape == (8, 16)
    again, other = (draw_samples(str(text_file), folder, samples=8, length=16, seed=seed) for seed in (3, 4))
    assert torch.equal(drawn.input_ids, again.input_ids)
    assert not torch.equal(drawn.input_ids, other.input_ids)
    windows = {tuple(row) for row in evaluation_windows(str(text_file), folder, length=16)[0].input_ids.tolist()}
    assert {tuple(row) for row in drawn.input_ids.tolist()} <= windows


@pytest.mark.parametrize(("tokens", "taken"), [(1, 1), (15, 1), (16, 2), (23, 2), (24, 3), (1000, 3)])
def test_whole_samples_are_taken_within_a_number_of_tokens(tokens, taken):
    ids = torch.arange(24).view(3, 8)
    assert torch.equal(Samples(ids).within(tokens).input_ids, ids[:taken])


def test_length_defaults_to_the_models_maximum(folder, text_file):
    assert draw_samples(str(text_file), folder, samples=2).input_ids.shape == (2, 64)


def test_json_lines_are_joined(folder, tmp_path):
    lines, text = tmp_path / "text.jsonl", tmp_path / "text.txt"
    lines.write_text(
        "\n".join(json.dumps({"text": part}) for part in ("one two three", "four five six")), encoding="utf-8"
    )
    text.write_text("one two three\n\nfour five six", encoding="utf-8")
    left, size = evaluation_windows(str(lines), folder, length=2)
    right, _ = evaluation_windows(str(text), folder, length=2)
    assert torch.equal(left.input_ids, right.input_ids)
    assert 0 < size <= len(text.read_text(encoding="utf-8"))


def test_data_sets_of_the_hub_library(folder, text_file, tmp_path):
    """A folder stands for a repository: the same library call reads both."""
    (tmp_path / "dataset").mkdir()
    lines = [json.dumps({"text": text}) for text in text_file.read_text(encoding="utf-8").split("\n\n")]
    (tmp_path / "dataset" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    left, _ = evaluation_windows(f"{tmp_path / 'dataset'}:train", folder, length=16)
    right, _ = evaluation_windows(str(tmp_path / "dataset" / "train.jsonl"), folder, length=16)
    assert torch.equal(left.input_ids, right.input_ids)
    with pytest.raises(NumpruneError, match="cannot be loaded"):
        draw_samples(f"{tmp_path / 'dataset'}:nonsense", folder)


def test_saved_samples_are_data_too(folder, text_file, tmp_path):
    drawn = draw_samples(str(text_file), folder, samples=8, length=16)
    save_samples(drawn, tmp_path / "drawn.safetensors")
    assert torch.equal(load_samples(tmp_path / "drawn.safetensors").input_ids, drawn.input_ids)
    again = draw_samples(str(tmp_path / "drawn.safetensors"), folder, samples=8, length=16)
    assert torch.equal(again.input_ids, drawn.input_ids)


def test_input_ids_need_no_tokenizer(folder, text_file, tmp_path):
    drawn = draw_samples(str(text_file), folder, samples=8, length=16)
    save_samples(drawn, tmp_path / "drawn.safetensors")
    for file in (tmp_path / "dense").glob("tokenizer*"):
        file.unlink()
    again = draw_samples(str(tmp_path / "drawn.safetensors"), folder, samples=8, length=16)
    assert torch.equal(again.input_ids, drawn.input_ids)
    with pytest.raises(NumpruneError, match="has no tokenizer"):
        draw_samples(str(text_file), folder, samples=8, length=16)


def test_fingerprint_sees_values_and_shape():
    rows = torch.arange(12).view(3, 4)
    assert fingerprint(rows) == fingerprint(rows.int())
    assert fingerprint(rows) != fingerprint(rows.view(4, 3))
    assert fingerprint(rows) != fingerprint(rows + 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("short.txt", b"too short", "0 windows of 16 tokens, but 8 are asked for"),
        ("binary.txt", b"\xff\xfe\x00", "no UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: not a JSON object with a string field `text`"),
        ("bad.safetensors", b"nonsense", "no readable tensor `input_ids`"),
    ],
)
def test_bad_files(folder, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(NumpruneError, match=message):
        draw_samples(str(path), folder, samples=8, length=16)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((8, 16), 300), r"token ids must be in \[0, 300\), got 300 to 300"),
        (torch.full((8, 16), -1), "got -1 to -1"),
        (torch.zeros(8, 16), "must be integers"),
        (torch.zeros(16, dtype=torch.long), "must be integers of shape"),
        (torch.zeros(7, 16, dtype=torch.long), "input_ids is 7 x 16, but 8 samples of 16 tokens"),
    ],
)
def test_bad_input_ids(folder, tmp_path, rows, message):
    save_file({"input_ids": rows}, tmp_path / "ids.safetensors")
    with pytest.raises(NumpruneError, match=message):
        draw_samples(str(tmp_path / "ids.safetensors"), folder, samples=8, length=16)


def test_missing_data_and_too_long_a_window(folder, text_file):
    with pytest.raises(NumpruneError, match=r"nowhere.txt not found\. Data is a text file"):
        draw_samples("nowhere.txt", folder)
    with pytest.raises(NumpruneError, match=r"length must be in \[2, 64\], the model's maximum; got 65"):
        draw_samples(str(text_file), folder, length=65)
