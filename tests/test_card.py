"""The model card says what the run knows, and nothing that it does not."""

import json
import re

from synthetic import config

from av_mae import card

META = {
    "labels": ["zero", "one"],
    "dataset_checksum": "abc",
    "provenance": {"jax": "0.10.2", "git_commit": ""},
}


def make(trainer: str = "finetune", **more) -> str:
    settings = config(f"digits/{trainer}", "")
    results = {"eval/top_1": 0.875, "eval/loss": 0.5}
    return card.text(settings, META, results, 1_500_000, **more)


def test_recipe_data_and_results_are_the_runs():
    text = make()
    for line in (
        "- data set: digits, split train, 200 clips of it",
        "- checksum of its records: `abc`",
        "- 16 epochs, 20 clips a step, seed 0",
        "- adamw, learning rate 0.0128 per 256 clips, weight decay 0.05",
        "- made with jax 0.10.2, commit `unknown`",
        "| top\\_1 | 0.875 |",
    ):
        assert line in text.splitlines(), line
    assert "1.5 M parameters" in text and "which of 2 classes" in text
    assert "8 frames of 64 × 64 pixels, one in 3 of 25 a second" in text
    assert 'model.predict("clip.mp4")' in text


def test_the_paper_is_that_of_the_kind_of_model():
    papers = {
        ("digits/finetune", ""): "Georgescu et al. 2023",
        ("digits/finetune", "video"): "Tong et al. 2022, VideoMAE",
        ("digits/finetune", "audio"): "Georgescu et al. 2023",
        ("ucf101/avmaskenhancer_finetune", ""): "Diao et al. 2023, AV-MaskEnhancer",
    }
    for (name, arg), paper in papers.items():
        assert f"After {paper}" in card.text(config(name, arg), META, {}, 1)


def test_what_a_published_file_does_not_tell_is_not_made_up():
    settings = config("digits/finetune", "")
    settings.data.dir = ""
    text = card.text(settings, {"labels": []}, {}, 1)
    assert text.count(card.UNKNOWN) == 2 and "learning rate" not in text
    assert "\n# Ti/16x2\n" in text and "like those of its data set shows" in text


def test_notes_stand_beside_the_results():
    text = card.text(
        config("digits/finetune", ""),
        META | {"caveats": ["40 of 50 listed clips present"]},
        {"eval/top_1": 0.5},
        1,
    )
    assert "- 40 of 50 listed clips present." in text.split("## Results")[1]


def test_a_pretraining_tells_its_masks():
    text = make("pretrain")
    masks = config("digits/pretrain", "").mask
    line = f"masks rgb {masks.rgb.kind} {masks.rgb.ratio:g}, spectrogram"
    assert line in text and 'model.reconstruct("clip.mp4", ratio=0.9)' in text
    assert "classes" not in text


def test_the_licence_is_what_was_said_or_not_known():
    assert 'license: "other"' in make() and "Nobody has said" in make()
    text = make(licence="CC-BY-4.0")
    assert 'license: "CC-BY-4.0"' in text
    assert "The weights are under CC-BY-4.0." in text


def test_a_programs_inputs_are_in_a_table():
    inputs = {"rgb": ((1, 8, 64, 64, 3), "uint8"), "has_rgb": ((), "bool")}
    text = make(to="stablehlo", inputs=inputs)
    assert "| `rgb` | b × 1 × 8 × 64 × 64 × 3 | uint8 |" in text
    assert "| `has_rgb` | b | bool |" in text and "jax.export.deserialize" in text
    assert "saved_model.load" in make(to="savedmodel", inputs=inputs)


def test_names_cannot_write_markdown_or_html():
    settings = config("digits/finetune", "")
    settings.data.dir = "sets/<img src=x>|**a**\n# b"
    text = card.text(settings, META, {}, 1)
    assert "<img" not in re.sub(r"\\<", "", text) and "\n# b" not in text
    assert "left no evaluation" in text


def test_labels_are_lines():
    assert card.label_lines(["a", "b\nc"]) == "a\nb c\n"
    assert card.label_lines({"verb": ["cut"], "noun": ["egg"]}) == (
        "verb: cut\nnoun: egg\n"
    )


def test_results_are_those_of_the_last_evaluation(tmp_path):
    assert card.results_of(tmp_path) == {}
    rows = [{"step": 1, "eval/top_1": 0.1}, {"step": 2, "eval/top_1": 0.2}]
    rows.append({"step": 3, "loss": 1.0})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "eval/to')  # a kill
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        (folder / str(step) / "state").mkdir(parents=True)
    for path in (tmp_path, folder, folder / "2"):
        assert card.results_of(path) == {"eval/top_1": 0.2}
    assert card.results_of(folder / "1") == {"eval/top_1": 0.1}
