"`evaluate` and `sumix_evaluate`: the same numbers as each measure gives, records that grow, kills, and wrong subjects"
import json
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sumix_nb.data.scenes import scenes
from sumix_nb.evaluation.accuracy import accuracy_of, predict, unseen_images
from sumix_nb.evaluation.adversarial import pgd
from sumix_nb.evaluation.corruption import CORRUPTIONS, under_corruption
from sumix_nb.running import evaluate as module
from sumix_nb.running.evaluate import MEASURES, Subject, evaluate, facts_of, headline, measure_subject
from sumix_nb.running.evaluate import read_evaluation, subject_of, sumix_evaluate, under_pgd
from sumix_nb.training.recipe import Recipe
from sumix_nb.training.records import load_records
from sumix_nb.training.train import make_learner, train
from tests.conftest import LIMIT, ROOT, finish

RECIPE = Recipe(width=4, limit=(60, 20), bs=20, epochs=1, lr=0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained Learner, and the folder that holds its record and its weights"
    folder = tmp_path_factory.mktemp("run")
    learn = make_learner(RECIPE)
    train(RECIPE, progress=False, learn=learn, folder=folder, weights=folder / "weights")
    return learn, folder


@pytest.fixture
def subject(run): return Subject(run[0].model, unseen_images(run[0].dls), "mine", "digits")


def contents(folder): return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def results(folder):
    "Everything in records that does not depend on time"
    records = {file.name: json.loads(file.read_text()) for file in Path(folder).iterdir()}
    return {name: {key: value for key, value in record.items() if key != "seconds"} for name, record in records.items()}


def test_file_and_learner_give_the_same_numbers_as_the_measures(run):
    learn, folder = run
    one = evaluate(learn, ["calibration", "fgsm", "occlusion"], name="x")
    other = measure_subject(subject_of(folder / "weights" / f"{RECIPE.name}.safetensors"), [*one])
    for name in one: assert one[name]["parts"] == other[name]["parts"], name
    test = unseen_images(learn.dls)
    share = accuracy_of(predict(learn.model, test), test.target)
    assert one["calibration"]["headline"]["accuracy"] == pytest.approx(share)
    assert one["fgsm"]["facts"]["n"] == 20 and learn.model.training is False


def test_all_corruptions_and_their_means(subject):
    found = measure_subject(subject, ["corruption"])["corruption"]
    assert list(found["parts"]) == list(CORRUPTIONS)
    assert found["parts"]["fog"] == under_corruption(subject.model, subject.test, "fog")
    every = [value for part in found["parts"].values() for value in part["accuracy"]]
    assert len(every) == 95 and found["headline"]["mean_19"] == pytest.approx(sum(every) / 95)
    assert len(found["headline"]["ece_severity"]) == 5 and "mean_15" in headline(found)


def test_what_applies_is_measured_by_default(run, monkeypatch):
    seen = []
    def fake(name):
        return replace(MEASURES[name], measure=lambda s, part: seen.append(name) or {}, headline=lambda found: {})
    monkeypatch.setattr(module, "MEASURES", {name: fake(name) for name in MEASURES})
    evaluate(run[0])
    assert set(seen) == {"calibration", "corruption", "fgsm", "occlusion", "ood"} and seen.count("corruption") == 19
    seen.clear()
    evaluate(run[0], layer="layer3", masked=scenes(3))
    assert seen.count("cam") == 2 and "pgd" not in seen


def test_maps_strange_images_and_pgd(run):
    masked = replace(scenes(6), target=scenes(6).target % 10)
    found = evaluate(run[0], "cam,ood", limit=10, layer="layer4", masked=masked)
    assert found["cam"]["headline"]["object"] == pytest.approx(masked.masks.double().mean().item())
    assert found["ood"]["parts"].keys() == {"scenes"} and 0 <= found["ood"]["headline"]["scenes"] <= 1
    few = Subject(run[0].model, unseen_images(run[0].dls, 10), "few")
    images, facts = few.test.normalised(few.test.images), {"mean": few.test.mean, "std": few.test.std}
    for level in (0, 8, 64):
        draws = torch.Generator().manual_seed(few.seed)
        attacked = pgd(few.model, images, few.test.target, level / 255, step=level / 4 / 255, generator=draws, **facts)
        right = accuracy_of(predict(few.model, few.test, attacked), few.test.target)
        assert under_pgd(few, str(level))["error"] == pytest.approx(1 - right)


def test_what_has_a_record_is_not_computed_again(subject, tmp_path, monkeypatch):
    first = measure_subject(subject, ["calibration"], tmp_path)
    before = contents(tmp_path)
    monkeypatch.setitem(MEASURES, "calibration", replace(MEASURES["calibration"], measure=None))
    assert measure_subject(subject, ["calibration"], tmp_path) == first and contents(tmp_path) == before


@pytest.mark.parametrize("stops", [random.Random(0).sample(range(1, 19), 10)])
def test_a_stop_at_any_part_loses_none_before_it(subject, tmp_path, monkeypatch, stops):
    def fake(s, part): return {"accuracy": [len(part) / 100] * 5, "ece": [0.1] * 5}
    done = []

    def stopping(s, part):
        if len(done) in stops and part not in stopped:
            stopped.add(part)
            raise KeyboardInterrupt
        done.append(part)
        return fake(s, part)

    stopped = set()
    monkeypatch.setitem(MEASURES, "corruption", replace(MEASURES["corruption"], measure=stopping))
    for _ in range(20):
        try: measure_subject(subject, ["corruption"], tmp_path)
        except KeyboardInterrupt: continue
    assert done == list(CORRUPTIONS) and len(stopped) == 10  # each once, in order
    record = json.loads((tmp_path / "mine.corruption.json").read_text())
    assert record["parts"] == {name: fake(None, name) for name in CORRUPTIONS} and "headline" in record


def measure_slowly(run_file, folder):
    "In a child: parts that take 20 ms each and say when they began"
    torch.set_num_threads(1)

    def slow(s, part):
        with open(Path(folder).parent / "began", "a") as log: log.write(f"{part}\n")
        time.sleep(0.02)
        return {"accuracy": [len(part) / 100] * 5, "ece": [0.1] * 5}

    MEASURES["corruption"] = replace(MEASURES["corruption"], measure=slow)
    measure_subject(subject_of(run_file), ["corruption"], folder)


def test_kills_at_random_moments_lose_no_record(run, tmp_path, start):
    file, = (run[1] / "weights").iterdir()
    folder, log, draws, kills = tmp_path / "records", tmp_path / "began", random.Random(1), 0
    for _ in range(10):
        known = log.read_text().count("\n") if log.exists() else 0
        if known > 17: break
        child = start(measure_slowly, file, folder)
        while child.is_alive() and (not log.exists() or log.read_text().count("\n") <= known): time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.04))
        child.kill()
        child.join()
        kills += 1
        for record in folder.glob("*.json"):
            found = json.loads(record.read_text())
            assert list(found["parts"]) == [*CORRUPTIONS][:len(found["parts"])]
    assert finish(start(measure_slowly, file, folder)) == 0
    began = log.read_text().split()
    assert [name for i, name in enumerate(began) if name not in began[:i]] == list(CORRUPTIONS)
    assert len(began) <= 19 + kills  # a kill repeats one part at most
    record = json.loads((folder / f"{RECIPE.name}.corruption.json").read_text())
    assert len(record["parts"]) == 19 and "headline" in record and len([*folder.iterdir()]) == 1


def test_training_records_stay_readable_beside_those_of_evaluations(run, capsys):
    sumix_evaluate(str(run[1] / "weights"), on="calibration", out=str(run[1]))
    line = capsys.readouterr().out
    assert line.startswith(f"{RECIPE.name}.calibration (") and "ece" in line
    assert [record["name"] for record in load_records(run[1])] == [RECIPE.name]
    assert [file.name for file in (run[1] / "evaluation").iterdir()] == [f"{RECIPE.name}.calibration.json"]


def test_an_exported_learner_is_told_its_images(run, tmp_path):
    learn, _ = run
    learn.export(tmp_path / "mine.pkl")
    found = subject_of(tmp_path / "mine.pkl", data="digits", limit=20)
    facts, wanted = facts_of(found), facts_of(Subject(learn.model, unseen_images(learn.dls), "x"))
    assert facts["weights"] == wanted["weights"] and found.name == "mine"
    assert facts["mean"] == pytest.approx(wanted["mean"]) and facts["std"] == pytest.approx(wanted["std"])
    with pytest.raises(ValueError, match="`data` must name"): subject_of(tmp_path / "mine.pkl")
    with pytest.raises(ValueError, match="`data` must have the classes"):
        subject_of(tmp_path / "mine.pkl", data="scenes")


@pytest.mark.parametrize("changes", [{}, {"view": "imagenet", "size": 40}, {"size": 16}])
def test_an_exported_learner_sees_images_as_in_its_training(changes, tmp_path):
    learn = make_learner(replace(RECIPE, valid="test", limit=None, **changes))
    learn.export(tmp_path / "mine.pkl")
    found = subject_of(tmp_path / "mine.pkl", data=RECIPE.data).test
    assert torch.equal(found.images, unseen_images(learn.dls).images)


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, limit=None), replace(RECIPE, valid=0.1, limit=None),
                                    replace(RECIPE, valid=0.1), replace(RECIPE, limit=(None, 30), seed=3)])
def test_a_file_is_tested_on_the_images_of_its_training(recipe, run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "trained_model", lambda file: (recipe, run[0].model))
    (tmp_path / "a.safetensors").write_bytes(b"")
    wanted = unseen_images(make_learner(recipe).dls)
    assert torch.equal(subject_of(tmp_path / "a.safetensors").test.images, wanted.images)


@pytest.mark.parametrize("spoil", [
    lambda record: "", lambda record: record[:-5], lambda record: "[]", lambda record: "{}", lambda record: "null",
    lambda record: json.dumps(json.loads(record) | {"parts": 3}),
    lambda record: json.dumps(json.loads(record) | {"seconds": {}})])
def test_damaged_records_are_named(spoil, subject, tmp_path):
    measure_subject(subject, ["calibration"], tmp_path)
    file, = tmp_path.iterdir()
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ValueError, match="mine.calibration.json is no record of an evaluation"):
        measure_subject(subject, ["calibration"], tmp_path)


@pytest.mark.parametrize(("change", "names"), [
    ({"seed": 1}, "seed"), ({"precision": "bf16"}, "precision"), ({"layer": "layer3"}, "layer"),
    ({"masked": scenes(2)}, "masked")])
def test_records_of_other_subjects_are_refused(change, names, subject, tmp_path):
    measure_subject(subject, ["calibration"], tmp_path)
    with pytest.raises(ValueError, match=f"of another subject, which differs in {names}: delete it"):
        measure_subject(replace(subject, **change), ["calibration"], tmp_path)


def test_other_masks_and_other_published_files_are_another_subject(subject, tmp_path):
    fresh = replace(subject, masked=scenes(3, seed=1))
    assert facts_of(fresh) != facts_of(replace(subject, masked=scenes(3, seed=2)))
    files = {}
    for name, value in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "fog.npy", np.full((10, 32, 32, 3), value, np.uint8))
        np.save(tmp_path / name / "labels.npy", np.zeros(10, np.uint8))
        files[name] = facts_of(replace(subject, published=str(tmp_path / name)))["published"]
    assert None not in files.values() and files["one"] != files["two"]


@pytest.mark.parametrize(("options", "message"), [
    ({"on": "rain"}, "`on` must be one of"), ({"on": "fgsm,rain"}, "`on` must be one of"),
    ({"on": "cam"}, r"`on` must not have \['cam'\]"), ({"limit": 0}, "`limit` must be at least 1"),
    ({"seed": -1}, "`seed` must be in"), ({"data": "scenes"}, "`data` must be that of"),
    ({"run": "nowhere"}, "no file nowhere"), ({"run": str(ROOT / "tests")}, r"no \*.safetensors in"),
    ({"run": str(ROOT / "setup.py")}, "does not hold the weights of a run"),
    ({"device": "gpu"}, "`device` must be one that PyTorch finds"),
    ({"published": "nowhere", "on": "corruption"}, "must hold CIFAR-C's files"),
    ({"out": str(ROOT / "setup.py")}, "setup.py")])
def test_what_cannot_be_measured_ends_with_one_clear_line(options, message, run, tmp_path):
    with pytest.raises(SystemExit, match=message) as error:
        sumix_evaluate(**{"run": str(run[1] / "weights"), "out": str(tmp_path)} | options)
    assert str(error.value).startswith("sumix_evaluate: ") and "\n" not in str(error.value)


def test_a_record_that_is_not_there_has_no_parts(tmp_path):
    assert read_evaluation(tmp_path / "a.json", {}) == {"parts": {}, "seconds": {}, "commits": {}}


def test_a_stop_says_that_the_same_command_goes_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "subject_of", partial(lambda *args, **options: (_ for _ in ()).throw(SystemExit(15))))
    with pytest.raises(SystemExit) as error: sumix_evaluate(str(run[1] / "weights"), out=str(tmp_path))
    assert error.value.code == 143 and "the same command goes on" in capsys.readouterr().err


def test_the_module_is_the_command(run, tmp_path, command):
    words = ["-m", "sumix_nb.running.evaluate", run[1] / "weights", "--on", "calibration", "--out", tmp_path]
    for _ in range(2):
        done = command(*words, PYTHONWARNINGS="ignore")
        output, errors = done.communicate(timeout=LIMIT)
        assert done.returncode == 0 and errors == "" and output.count("\n") == 1, errors
    assert "calibration" in output and len([*(tmp_path / "evaluation").iterdir()]) == 1
