"""`moevision export`: what it prints, what it refuses, and that the lines it offers run."""

import re
import time

import pytest
import timm
import torch

from moevision.commands.export import experts_sentence, latency_ms
from moevision.commands.predict import predict_batch
from moevision.efficiency import measure_cost
from moevision.models.io import load_model
from moevision.train.report import template
from tests.shared import assert_names, refused, succeeded


@pytest.mark.deep
@pytest.mark.needs("onnx")
@pytest.mark.filterwarnings(
    "ignore::moevision.errors.DataWarning"
)  # a copy of the run's images lacks the broken one
def test_export_says_what_it_costs_and_how_to_run_it(
    cli, tiny_run, drawn_pets, tmp_path, own_folder
):
    outcome = succeeded(
        cli("export", tiny_run, "--out", "pets.onnx", "--data", drawn_pets, "--limit", 2)
    )
    assert_names(outcome.out, "pets.onnx: ", "2 classes, 32 px", "ALL 4 experts", "2 of them.")
    assert "on 6 images" in outcome.out  # four of noise
    sparse, dense = (
        float(row) for row in re.findall(r"(?:the model|this file) +│ +([\d.]+) ", outcome.out)
    )
    # Two MoE layers of 16 tokens, D 32, H 64; two more experts of 2·(D·H + H·D) FLOPs per token.
    assert dense - sparse == pytest.approx(2 * 16 * 2 * 2 * (32 * 64 + 64 * 32) / 1e6, abs=0.11)

    lines = template("run_exported.py.jinja").render(file="'pets.onnx'", fit="crop", routes=False)
    assert outcome.out.endswith(f"{lines}\n")
    picture = next(drawn_pets.rglob("*.png"))
    (tmp_path / "image.jpg").write_bytes(
        picture.read_bytes()
    )  # a PNG, whatever its name; 32 px, so nothing is lost
    told: list[str] = []
    exec(lines, {"print": told.append})
    assert told == [predict_batch(load_model(str(tiny_run)), [picture])[0].classes[0]]


def test_a_program_is_written_by_its_ending_and_its_lines_run(cli, tiny_run, drawn_pets, tmp_path):
    outcome = succeeded(cli("export", tiny_run, "--out", "pets.pt2"))
    assert_names(outcome.out, "pets.pt2: ", "2 classes, 32 px", "ALL 4 experts")
    lines = template("run_exported.py.jinja").render(file="'pets.pt2'", fit="crop", routes=False)
    assert outcome.out.endswith(f"{lines}\n")

    picture = next(drawn_pets.rglob("*.png"))
    (tmp_path / "image.jpg").write_bytes(picture.read_bytes())
    told: list[str] = []
    exec(lines, {"print": told.append})
    assert told == [predict_batch(load_model(str(tiny_run)), [picture])[0].classes[0]]

    written = (tmp_path / "pets.pt2").read_bytes()
    refused(cli("export", tiny_run, "--out", "pets.pt2"), "--force")
    refused(cli("export", tiny_run, "--out", "new.pt2", "--opset", "20"), "--opset", ".onnx")
    refused(cli("export", tiny_run, "--out", "new.pt2", "--routes"), "--routes", ".onnx")
    refused(cli("export", tiny_run, "--out", "new.bin"), ".onnx", ".pt2")
    # moevision opens no such file: parts of some would be unpickled
    refused(cli("predict", "pets.pt2", picture))
    assert (tmp_path / "pets.pt2").read_bytes() == written
    assert not list(tmp_path.glob("new.*"))


def test_the_sentence_about_experts_fits_the_model():
    def sentence(**options):
        return experts_sentence(timm.create_model("test_vit_moe", **options))

    assert_names(sentence(), "ALL 4 experts", "computes 2 of", "them.")
    assert_names(sentence(router="expert_choice"), "computes 2 of", "on average.")
    mixed = sentence(num_experts=[4, 8], top_k=[1, 2])
    assert_names(mixed, "ALL 4 to 8 experts", "computes 1 to 2 of")
    assert_names(sentence(router="soft"), "Soft MoE", "same work")
    assert_names(sentence(moe_layers=[]), "no experts", "same work")


def test_dense_flops_are_those_of_all_experts():
    def flops(top_k, backend, router="vmoe_top_k"):
        model = timm.create_model("test_vit_moe", router=router, top_k=top_k, expert_hidden=64)
        return measure_cost(model, 32, backend=backend).flops_per_image

    assert flops(1, "loop") < flops(2, "loop") < flops(2, "dense")
    assert flops(1, "dense") == flops(2, "dense") == flops(4, "loop")
    assert flops(2, "dense", "soft") == flops(2, "loop", "soft")


def test_a_latency_is_a_median_in_milliseconds():
    assert 20 <= latency_ms(lambda images: time.sleep(0.02), torch.zeros(1)) < 200
