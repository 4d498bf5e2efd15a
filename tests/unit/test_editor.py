"""The bridge to the engine, on the tiny random model of the reference case."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from kontext_batch.editor import (
    EngineEditor,
    check_model,
    convert_model,
    count_tokens,
    needed_memory,
    numeric_mode,
    read_model,
)
from kontext_batch.errors import InfrastructureError, OutOfMemory, SettingsError, StepError
from kontext_batch.operations.pictures import open_picture
from kontext_batch.planning.marking import Ancestry, xmp_packet
from kontext_batch.ports import EditJob, LoadedPicture, MadePicture
from kontext_batch.provenance.marks import step_key_of

CASE = Path(__file__).parents[1] / "data" / "reference" / "case-1" / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference case as a model for 64x64 pixels."""
    folder = tmp_path_factory.mktemp("models") / "small"
    shutil.copytree(CASE, folder)
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 64}))
    return folder


@pytest.fixture(scope="module")
def editor(model: Path) -> EngineEditor:
    return EngineEditor(models={"small": model}, adapters={}, device="cpu", max_rows=4)


def png(size: tuple[int, int], colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def job(**changes: Any) -> EditJob:
    params: dict[str, Any] = {
        "model": "small",
        "numeric_mode": "float32",
        "adapters": [],
        "prompt": "make it red",
        "negative_prompt": None,
        "true_cfg_scale": 1.0,
        "steps": 2,
        "guidance": 2.5,
        "seed": 7,
        "target": {"width": 64, "height": 64},
        "canvas": {
            "width": 64,
            "height": 64,
            "fit": "pad",
            "background": "#00FF00",
            "box": {"x": 0, "y": 16, "width": 64, "height": 32},
        },
        "references": [],
        "reference_layout": "offset",
    }
    pictures = changes.pop("pictures", (LoadedPicture("image", 0, png((100, 50), "blue")),))
    return EditJob(params={**params, **changes}, pictures=pictures)


def made(result: MadePicture | Exception) -> MadePicture:
    assert isinstance(result, MadePicture), result
    return result


def edit(editor: EngineEditor, jobs: Sequence[EditJob]) -> list[MadePicture | StepError]:
    """One result for each job, in order."""
    results: dict[int, MadePicture | StepError] = {}
    with editor.session(jobs[0].params) as session:
        for number, each in enumerate(jobs):
            try:
                session.admit(number, editor.prepare(each))
            except StepError as error:
                results[number] = error
        while len(results) < len(jobs):
            session.step()
            for number, left in session.retire():
                results[number] = left if isinstance(left, StepError) else left.encode()
    return [results[number] for number in range(len(jobs))]


def test_a_sampled_picture_carries_the_mark_that_it_is_given(editor: EngineEditor) -> None:
    key = "b2:" + "ab" * 20
    asked = job()
    with editor.session(asked.params) as session:
        session.admit(0, editor.prepare(asked))
        while not (left := session.retire()):
            session.step()
    ((_, sampled),) = left
    assert not isinstance(sampled, StepError)
    marked, plain = sampled.encode(xmp=xmp_packet(key, Ancestry(model=True))), sampled.encode()
    assert (step_key_of(marked.data), step_key_of(plain.data)) == (key, None)
    assert open_picture(marked.data).tobytes() == open_picture(plain.data).tobytes()
    assert marked.latents == plain.latents


def test_facts_of_a_model(model: Path) -> None:
    facts = read_model(model)
    assert (facts.layout, facts.native_area, facts.text_length) == ("diffusers", 64 * 64, 512)
    assert facts.sha256 == read_model(model).sha256
    check_model(model)


def test_a_model_with_a_missing_tensor_is_told(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file)
    with pytest.raises(SettingsError, match=r"1 missing: proj_out\.bias"):
        check_model(broken)


def test_conversion_gives_a_folder_that_loads(model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path / "converted")
    check_model(tmp_path / "converted")


def test_tokens_are_counted_as_the_engine_counts_them(model: Path) -> None:
    from engine.pipeline import KontextEngine

    engine = KontextEngine.load(model, device="cpu", text_length=32)
    for prompt in ("make it red", "Ein grünes Häuschen, bitte!", ""):
        assert count_tokens(model, prompt) == engine.text.count_tokens(prompt)


def test_numeric_mode_without_a_gpu() -> None:
    assert numeric_mode("cpu", "auto") == "float32"
    assert numeric_mode("cuda:1", "auto") == "bfloat16"
    assert numeric_mode("cuda", "float32") == "float32"
    assert numeric_mode("cuda", "float8", step_tolerance=0.05, context_every=4) == "float8+steps=0.05+context=4"
    assert numeric_mode("cpu", "auto", compiled=True) == "float32+compiled"


def test_an_engine_is_planned_for_the_contexts_that_it_keeps(model: Path) -> None:
    editor = EngineEditor(models={"small": model}, adapters={}, device="cpu")
    exact = editor._loaded_for(job().params)
    assert editor._loaded_for(job(numeric_mode="float32+steps=0.1").params) is exact
    keeping = editor._loaded_for(job(numeric_mode="float32+context=2").params)
    assert keeping is not exact
    assert editor._loaded_for(job(numeric_mode="float32+context=4").params) is keeping
    one, other = (needed_memory(model, device="cpu", mode=f"float32{mode}", rows=1).row for mode in ("", "+context=2"))
    assert other > one


def test_canvases_are_padded_or_cropped_never_stretched(editor: EngineEditor) -> None:
    canvas = np.asarray(editor._fitted(job().pictures[0], job().params["canvas"]))
    assert canvas.shape == (64, 64, 3)
    assert (canvas[16:48] == (0, 0, 255)).all()
    assert (canvas[:16] == (0, 255, 0)).all()
    assert (canvas[48:] == (0, 255, 0)).all()
    halves = Image.new("RGB", (100, 50), "blue")
    halves.paste("red", (50, 0, 100, 50))
    out = io.BytesIO()
    halves.save(out, "PNG")
    crop = {**job().params["canvas"], "fit": "crop", "box": {"x": 50, "y": 0, "width": 50, "height": 50}}
    cropped = np.asarray(editor._fitted(LoadedPicture("image", 0, out.getvalue()), crop))
    assert (cropped == (255, 0, 0)).all()


def test_a_batch_of_jobs_equals_them_alone_and_errors_stay_with_their_job(editor: EngineEditor) -> None:
    jobs = [job(), job(seed=8), job(pictures=(LoadedPicture("image", 0, b"no picture"),))]
    first, second, broken = edit(editor, jobs)
    assert isinstance(broken, StepError)
    assert "image" in str(broken)
    alone = made(edit(editor, [job(seed=8)])[0])
    difference = np.abs(pixels(made(second).data) - pixels(alone.data))
    assert difference.max() <= 1
    assert made(first).data != made(second).data


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(data)), np.int16)


def test_latents_are_handed_on_undecoded(editor: EngineEditor) -> None:
    first = made(edit(editor, [job()])[0])
    assert first.latents is not None
    through = LoadedPicture("image", 0, first.data, first.latents)
    by_latents = made(edit(editor, [job(seed=9, pictures=(through,))])[0])
    by_pixels = made(
        edit(
            editor,
            [
                job(
                    seed=9,
                    pictures=(replace(through, latents=None),),
                    canvas={**job().params["canvas"], "box": {"x": 0, "y": 0, "width": 64, "height": 64}},
                )
            ],
        )[0]
    )
    assert by_latents.data != by_pixels.data
    older = save({"latents": load(first.latents)["latents"]}, metadata={"width": "64", "height": "64"})
    assert made(edit(editor, [job(seed=9, pictures=(replace(through, latents=older),))])[0]).data == by_latents.data


def latents(result: MadePicture | StepError) -> torch.Tensor:
    data = made(result).latents
    assert data is not None
    return load(data)["latents"]


def test_jobs_that_join_and_leave_make_what_the_engine_makes_of_each_alone(editor: EngineEditor) -> None:
    """Whoever shares the device and from which denoise step on: the latents are those of `KontextEngine.edit`."""
    jobs = [job(seed=seed, steps=steps) for seed, steps in enumerate((3, 5, 2, 4, 3))]
    waiting = list(enumerate(jobs))
    found: dict[int, MadePicture] = {}
    with editor.session(jobs[0].params) as session:
        while len(found) < len(jobs):
            if waiting and session.free > 1:  # one a step, so that no two begin together
                number, each = waiting.pop(0)
                session.admit(number, editor.prepare(each))
            session.step()
            found |= {number: left.encode() for number, left in session.retire() if not isinstance(left, StepError)}
        assert session.free == 4
    engine = editor._loaded_for(jobs[0].params)
    for number, alone in enumerate(engine.edit([editor.prepare(each) for each in jobs])):
        assert (latents(found[number]) - alone.latents).abs().max() <= 2e-5


@pytest.mark.parametrize("call", ["admit", "step", "retire"])
def test_a_device_without_room_is_no_fault_of_a_job(
    editor: EngineEditor, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(f"engine.session.Session.{call}", full)
    with pytest.raises(OutOfMemory, match="with 1 images"):
        edit(editor, [job()])


def test_a_device_without_room_for_a_model_is_nobodys_fault(
    editor: EngineEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again: what held the memory may be on its way out."""

    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("engine.pipeline.load_transformer", full)
        fresh = replace(editor, _engine=None, _loaded=None)
        with pytest.raises(InfrastructureError, match="no memory for model") as caught, fresh.session(job().params):
            pass
    assert not isinstance(caught.value, OutOfMemory)
    with fresh.session(job().params) as session:
        assert session.free == 4


def test_a_request_that_the_engine_refuses_is_the_jobs_own_fault(editor: EngineEditor) -> None:
    with editor.session(job().params) as session:
        with pytest.raises(StepError, match="steps is 0"):
            session.admit(1, editor.prepare(job(steps=0)))
        assert session.free == 4


def test_modes_are_read_as_they_are_written() -> None:
    from engine.errors import ConfigError
    from engine.modes import Approximation, Mode

    for mode in (
        Mode("float32"),
        Mode("bfloat16", Approximation(step_tolerance=0.05)),
        Mode("float8", Approximation(context_every=4)),
        Mode("bfloat16", Approximation(0.125, 2)),
        Mode("float32", compiled=True),
        Mode("bfloat16", Approximation(0.125, 2), compiled=True),
    ):
        assert Mode.parse(str(mode)) == mode
    for unknown in (
        "float12",
        "float32+steps",
        "float32+steps=2",
        "bfloat16+context=0",
        "float32+tea=1",
        "compiled",
        "",
    ):
        with pytest.raises(ConfigError):
            Mode.parse(unknown)


def test_the_mode_of_a_lane_is_what_the_engine_samples_in(model: Path) -> None:
    editor = EngineEditor(models={"small": model}, adapters={}, device="cpu", batch_invariant=True, cuda_graphs=True)
    for text, tolerance, every in (("float32", 0.0, 1), ("float32+steps=0.1+context=2", 0.1, 2), ("float32", 0.0, 1)):
        edit(editor, [job(numeric_mode=text)])
        engine = editor._engine
        assert engine is not None
        assert (engine.approximation.step_tolerance, engine.approximation.context_every) == (tolerance, every)
        assert engine.batch_invariant
        assert engine.cuda_graphs
    assert editor.describe()["batch_invariant"] is True
    with pytest.raises(StepError, match="not known here"):
        edit(editor, [job(numeric_mode="float32+tea=1")])


def test_a_lane_of_compiled_kernels_loads_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.kernels import kernels_for
    from engine.kernels.compiled import Compiled
    from engine.kernels.plain import Plain

    editor = EngineEditor(models={"small": model}, adapters={}, device="cpu")
    for mode, kind in (("float32+compiled", Compiled), ("float32", Plain)):
        with editor.session(job(numeric_mode=mode).params):
            assert editor._engine is not None
            assert isinstance(editor._engine.kernels, kind)
    kernels_for.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(StepError, match="install no-such-compiler"):
        edit(editor, [job(numeric_mode="float32+compiled")])


def test_a_picture_is_the_same_whatever_is_sampled_beside_it(model: Path) -> None:
    editor = EngineEditor(models={"small": model}, adapters={}, device="cpu", batch_invariant=True)
    alone = made(edit(editor, [job(seed=8)])[0])
    among = made(edit(editor, [job(), job(seed=8, steps=3), job(seed=8), job(seed=9)])[2])
    assert among.data == alone.data
    assert among.latents == alone.latents
