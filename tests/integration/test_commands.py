"""train.py and evaluate.py as a user runs them: complete, repeated, in parallel, and with wrong input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, TINY, fill, last_line, mean_of, run, run_process, write_pair
from PIL import Image
from small_network import SmallNetwork

import evaluate
import fused
import train
from dataset.labels import CITYSCAPES
from networks import ABN, Seg_Model
from networks.recomputation import current_outputs
from utils import args as flags_of

#: The commands, which know the small network here (tests/small).
TRAIN_PY, EVALUATE_PY = "tests/small/train.py", "tests/small/evaluate.py"
RECIPE = ["--input-size", "33,33", "--batch-size", "2", "--random-mirror", "--random-scale"]
TRAIN = [*TINY, *RECIPE]

pytestmark = pytest.mark.usefixtures("small_network")


def called(module, arguments, monkeypatch, capsys) -> tuple[int, str]:
    """Run a command in this process; return its exit status and last line on standard error."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    try:
        status = flags_of.exit_status(module.main)
    except SystemExit as exit:  # argparse's
        status = exit.code
    return status, last_line(capsys.readouterr().err or "\n-")


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_weights(one, other) -> bool:
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


def make_data(folder) -> None:
    """Write six training and five validation pictures with label and instance ids."""
    for split, count in (("train", 6), ("val", 5)):
        for number in range(count):
            _, label = write_pair(folder, split, number, (48, 64))
            ids = cv2.imread(str(folder / label), cv2.IMREAD_GRAYSCALE)
            instances = np.where(ids >= 24, ids.astype(np.uint16) * 1000 + 1, ids).astype(np.uint16)
            cv2.imwrite(str(folder / label.replace("labelIds", "instanceIds")), instances)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a data set and a run of four steps of the small network, its output, its flags."""
    folder = tmp_path_factory.mktemp("run")
    make_data(folder / "data")
    arguments = ["--data-dir", folder / "data", *TRAIN, "--num-steps", "4", "--print-frequency", "1"]
    done = run(TRAIN_PY, *arguments, "--snapshot-dir", folder / "snapshots", "--save-pred-every", "2")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, arguments


@pytest.fixture(scope="module")
def trained_resnet(tmp_path_factory):
    """Return a folder with a data set and a run of four steps of the real network, its output, its flags."""
    folder = tmp_path_factory.mktemp("real")
    make_data(folder / "data")
    arguments = ["--data-dir", folder / "data", *SMALL, *RECIPE, "--num-steps", "4", "--print-frequency", "1"]
    done = run("train.py", *arguments, "--snapshot-dir", folder / "snapshots", "--save-pred-every", "2")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, arguments


@pytest.mark.parametrize(
    "command",
    [
        "train.py",
        "evaluate.py",
        "dataset.check",
        "dataset.mini",
        "tools.attention",
        "tools.convert",
        "tools.explore",
        "tools.export",
        "tools.predict",
        "tools.prepare",
        "tools.profile",
        "tools.report",
        "tools.seeds",
    ],
)
@pytest.mark.slow
def test_each_command_starts_as_a_process(command):
    done = run_process(command, "--help")
    assert done.returncode == 0 and not done.stderr, done.stderr
    name = command if command.endswith(".py") else f"python -m {command}"
    assert done.stdout.startswith(f"usage: {name} ")
    wrong = run(command, "--no-such-flag")  # in this process: the same name
    assert wrong.returncode == 2 and last_line(wrong.stderr).startswith(f"{command}: error: ")


@pytest.mark.slow
class TestRealNetwork:
    def test_what_it_says_and_leaves(self, trained_resnet):
        folder, output, _ = trained_resnet
        assert "6 pictures" in output and "no --restore-from" in output and "step 4/4" in output
        snapshots = folder / "snapshots"
        assert (snapshots / "CS_scenes_2.pth").exists()
        (events,) = (snapshots / "tensorboard").iterdir()
        for picture in (b"train/image_label_prediction", b"train/attention"):
            assert events.read_bytes().count(picture) == 2
        (start,) = json.loads((snapshots / "environment.json").read_text())
        assert start["step"] == 0 and start["processes"] == 1 and start["torch"] == torch.__version__
        state = torch.load(snapshots / "CS_scenes_4.pth", weights_only=True)
        assert set(state) == set(Seg_Model(19, backbone="resnet50").state_dict())
        log = entries(snapshots)
        assert [entry["step"] for entry in log] == [1, 2, 3, 4]
        for entry in log:
            assert entry["lr"] == pytest.approx(1e-2 * (1 - (entry["step"] - 1) / 4) ** 0.9)
            assert entry["loss"] == pytest.approx(
                entry["main_loss"] + 0.4 * entry["auxiliary_loss"], rel=1e-5
            )
            assert len(entry["samples"]) == 2 and all("scale=" in sample for sample in entry["samples"])

    def test_resumed_run_equals_the_uninterrupted_one(self, trained_resnet, tmp_path):
        folder, _, arguments = trained_resnet
        snapshots = folder / "snapshots"
        for name in ("state_2.pt", "state_2.json", "log.jsonl"):
            os.link(snapshots / name, tmp_path / name)
        done = run("train.py", *arguments, "--snapshot-dir", tmp_path, "--resume", "--save-pred-every", "2")
        assert done.returncode == 0, done.stderr
        assert "continuing after step 2" in done.stdout
        assert same_weights(tmp_path / "CS_scenes_4.pth", snapshots / "CS_scenes_4.pth")


class TestTraining:
    def test_again_gives_the_same_weights_and_sets_the_first_run_aside(self, trained, tmp_path):
        folder, _, arguments = trained
        for _ in range(2):
            done = run(TRAIN_PY, *arguments, "--snapshot-dir", tmp_path)
            assert done.returncode == 0, done.stderr
        assert "earlier_1" in done.stdout
        assert same_weights(tmp_path / "CS_scenes_4.pth", folder / "snapshots/CS_scenes_4.pth")

    def test_resumed_run_equals_the_uninterrupted_one(self, trained, tmp_path):
        folder, _, arguments = trained
        snapshots = folder / "snapshots"
        for name in ("state_2.pt", "state_2.json", "log.jsonl"):
            os.link(snapshots / name, tmp_path / name)
        done = run(TRAIN_PY, *arguments, "--snapshot-dir", tmp_path, "--resume", "--save-pred-every", "2")
        assert done.returncode == 0, done.stderr
        assert "continuing after step 2" in done.stdout
        assert same_weights(tmp_path / "CS_scenes_4.pth", snapshots / "CS_scenes_4.pth")
        keep = ("step", "loss", "lr", "samples")
        logs = [
            [{name: entry[name] for name in keep} for entry in entries(run)] for run in (tmp_path, snapshots)
        ]
        assert logs[0] == logs[1]

    @pytest.mark.slow
    def test_resume_of_three_processes_is_exact_too(self, trained, tmp_path):
        """The rounded sum of three numbers depends on their order, which a resume must not change."""
        folder, _, _ = trained
        flags = ["--data-dir", folder / "data", *TRAIN[2:], "--nproc", 3, "--batch-size", 3, "--num-steps", 4]
        flags += ["--save-state-every", 2, "--snapshot-dir"]
        done = run(TRAIN_PY, *flags, tmp_path / "whole")
        assert done.returncode == 0, done.stderr
        (tmp_path / "resumed").mkdir()
        for name in ("state_2.pt", "state_2.json"):
            os.link(tmp_path / "whole" / name, tmp_path / "resumed" / name)
        done = run(TRAIN_PY, *flags, tmp_path / "resumed", "--resume")
        assert done.returncode == 0 and "continuing after step 2" in done.stdout, done.stderr
        assert same_weights(*(tmp_path / name / "CS_scenes_4.pth" for name in ("whole", "resumed")))

    def test_resume_of_a_finished_run_says_so(self, trained):
        folder, _, arguments = trained
        done = run(TRAIN_PY, *arguments, "--snapshot-dir", folder / "snapshots", "--resume")
        assert done.returncode == 0 and "the run is finished" in done.stdout

    @pytest.mark.slow
    def test_resume_by_two_processes_has_the_samples_and_masks_of_one(self, trained, tmp_path):
        folder, _, arguments = trained
        snapshots = folder / "snapshots"
        for name in ("state_2.pt", "state_2.json", "log.jsonl"):
            shutil.copy(snapshots / name, tmp_path)
        flags = [*arguments[:2], *TRAIN[2:], "--num-steps", 4, "--print-frequency", 1, "--nproc", 2]
        done = run(TRAIN_PY, *flags, "--snapshot-dir", tmp_path, "--resume")
        assert done.returncode == 0 and "continuing after step 2" in done.stdout, done.stderr
        one, two = entries(snapshots), entries(tmp_path)
        assert [entry["samples"] for entry in one] == [entry["samples"] for entry in two]
        # The weights are the same. With different dropout masks, losses would differ by more than 0.1 %.
        for name in ("loss", "main_loss", "auxiliary_loss"):
            assert two[2][name] == pytest.approx(one[2][name], rel=1e-5)
            assert two[3][name] == pytest.approx(one[3][name], rel=1e-2)
        assert two[2]["gradient_norm"] == pytest.approx(one[2]["gradient_norm"], rel=1e-3)

    @pytest.mark.slow
    def test_any_number_of_processes_has_the_same_samples_and_the_same_first_loss(self, trained, tmp_path):
        """This holds for any share of void in a process. Later losses differ by amplified rounding."""
        folder, _, _ = trained
        flags = ["--data-dir", folder / "data", *TRAIN[2:], "--batch-size", 4]
        flags += ["--num-steps", 2, "--print-frequency", 1]
        logs = []
        for processes, workers in ((1, 0), (1, 3), (2, 1), (4, 0)):
            snapshots = tmp_path / f"{processes}-{workers}"
            some = ["--nproc", processes, "--num-workers", workers, "--snapshot-dir", snapshots]
            done = run(TRAIN_PY, *flags, *some)
            assert done.returncode == 0, done.stderr
            logs.append(entries(snapshots))
        for log in logs[1:]:
            assert [entry["samples"] for entry in log] == [entry["samples"] for entry in logs[0]]
            assert log[0]["loss"] == pytest.approx(logs[0][0]["loss"], rel=1e-4)
            assert log[0]["gradient_norm"] == pytest.approx(logs[0][0]["gradient_norm"], rel=1e-2)

    @pytest.mark.slow
    def test_speed_options_stay_within_two_percent(self, trained, tmp_path):
        """bfloat16, channels_last and the compiler change the first losses by rounding only."""
        folder, _, _ = trained
        flags = ["--data-dir", folder / "data", *TRAIN, "--num-steps", 6, "--print-frequency", 1]
        losses = []
        for number, some in enumerate(([], ["--amp", "bf16", "--channels-last", "--compile"])):
            # The compiler leaves processes and caches behind.
            start = run_process if some else run
            done = start(TRAIN_PY, *flags, *some, "--snapshot-dir", tmp_path / str(number))
            assert done.returncode == 0, done.stderr
            losses.append(np.array([entry["loss"] for entry in entries(tmp_path / str(number))]))
        assert (np.abs(losses[1] / losses[0] - 1) < 0.02).all() and (losses[1] != losses[0]).all()

    @pytest.mark.skipif(not fused.active(torch.device("cpu")), reason="the fused operators are not built")
    def test_recomputation_changes_no_bit(self, trained, tmp_path, monkeypatch):
        """train.py passes the flag on, and the run ends with the same weights."""
        _, _, arguments = trained
        ends, recomputed = [], []
        forward = ABN._forward_fused

        def spied(norm, x, residual):
            recomputed.append(current_outputs() is not None)
            return forward(norm, x, residual)

        monkeypatch.setattr(ABN, "_forward_fused", spied)
        for flags in ([], ["--recompute"]):
            folder = tmp_path / str(len(flags))
            done = run(TRAIN_PY, *arguments, *flags, "--num-steps", 2, "--snapshot-dir", folder)
            assert done.returncode == 0, done.stderr
            assert any(recomputed) == bool(flags)
            ends.append((folder / "CS_scenes_2.pth").read_bytes())
        assert ends[0] == ends[1]

    def test_fine_tuning_options(self, trained, tmp_path):
        """All fine-tuning options work together: frozen statistics, averaged and best weights, the log."""
        folder, _, arguments = trained
        weights = folder / "snapshots/CS_scenes_4.pth"
        flags = [
            "--restore-from",
            weights,
            "--freeze-bn",
            "--class-weights",
            ",".join(["2", "0.5"] + ["1"] * 17),
        ]
        flags += ["--ema", 0.9, "--val-every", 2, "--grad-accum", 2, "--deterministic"]
        done = run(TRAIN_PY, *arguments, *flags, "--num-steps", 3, "--snapshot-dir", tmp_path)
        assert done.returncode == 0, done.stderr
        start, end, average, best = (
            torch.load(path, weights_only=True)
            for path in (weights, *(tmp_path / f"CS_scenes_{name}.pth" for name in ("3", "3_ema", "best")))
        )
        assert set(start) == set(end) == set(average) == set(best)
        for name in start:
            assert torch.equal(start[name], end[name]) == ("running" in name), name
        assert not torch.equal(average["head.bottleneck.3.weight"], end["head.bottleneck.3.weight"])
        assert done.stdout.count("mean IoU") == 2  # after steps 2 and 3
        assert all(entry["gradient_norm"] > 0 and entry["memory_mb"] > 100 for entry in entries(tmp_path))
        # Other flags are refused without --change-recipe.
        flags[flags.index("--ema") + 1] = 0.5
        flags += ["--num-steps", 4, "--snapshot-dir", tmp_path, "--resume"]
        done = run(TRAIN_PY, *arguments, *flags)
        assert done.returncode == 2 and "--change-recipe" in last_line(done.stderr)
        done = run(TRAIN_PY, *arguments, *flags, "--change-recipe")
        assert done.returncode == 0 and "continuing after step 3" in done.stdout, done.stderr

    @pytest.mark.slow
    def test_gradients_are_averaged_over_the_processes(self, trained, tmp_path):
        """Without void, the mean of the processes' means is the mean over the batch."""
        folder, _, _ = trained
        for label in (folder / "data/gtFine/train/ulm").glob("*labelIds.png"):
            ids = cv2.imread(str(label), cv2.IMREAD_GRAYSCALE)
            ids[ids == 0] = 7
            (tmp_path / "gtFine/train/ulm").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "gtFine/train/ulm" / label.name), ids)
        os.symlink(folder / "data/leftImg8bit", tmp_path / "leftImg8bit")
        flags = ["--data-dir", tmp_path, *TRAIN[2:], "--num-steps", 1]
        torch.manual_seed(train.seed_of(12345))
        start = SmallNetwork(19).state_dict()
        changes = []
        for processes in (1, 2):
            done = run(TRAIN_PY, *flags, "--nproc", processes, "--snapshot-dir", tmp_path / str(processes))
            assert done.returncode == 0, done.stderr
            end = torch.load(tmp_path / str(processes) / "CS_scenes_1.pth", weights_only=True)
            changes.append({name: (end[name] - start[name]).flatten().double() for name in end})
        one, two = changes
        assert set(one) == set(start)
        # Float32 sums in two orders are not equal, but closer than those of either half of the batch.
        for name in (
            "head.bottleneck.3.weight",
            "dsn.3.weight",
            "head.conva.0.weight",
            "head.conva.1.weight",
        ):
            assert torch.cosine_similarity(one[name], two[name], 0) > 0.995, name
            assert two[name].norm() == pytest.approx(one[name].norm().item(), rel=0.05), name

    @pytest.mark.parametrize("kind", ["ram", "disk"])
    def test_cache_changes_nothing(self, trained, tmp_path, kind):
        folder, _, arguments = trained
        flags = [
            "--cache",
            kind,
            "--cache-dir",
            tmp_path,
            "--num-workers",
            2,
            "--snapshot-dir",
            tmp_path / "run",
        ]
        done = run(TRAIN_PY, *arguments, *flags)
        assert done.returncode == 0, done.stderr
        assert f"--cache {kind}: room for 6 of 6 decoded pictures" in done.stdout
        assert same_weights(tmp_path / "run/CS_scenes_4.pth", folder / "snapshots/CS_scenes_4.pth")
        assert len(list(tmp_path.glob("pictures-*.cache"))) == (kind == "disk")

    @pytest.mark.slow
    def test_processes_share_a_cache(self, trained, tmp_path):
        folder, _, _ = trained
        flags = ["--data-dir", folder / "data", *TRAIN[2:], "--nproc", 2, "--num-steps", 2, "--cache", "ram"]
        done = run(TRAIN_PY, *flags, "--print-frequency", 1, "--snapshot-dir", tmp_path)
        assert done.returncode == 0 and done.stdout.count("decoded pictures") == 1, done.stderr
        expected = [entry["samples"] for entry in entries(folder / "snapshots")]
        assert [entry["samples"] for entry in entries(tmp_path)] == expected[:2]

    def test_cache_larger_than_what_is_free(self, trained, tmp_path, monkeypatch, capsys):
        _, _, arguments = trained
        monkeypatch.setattr(train.cache, "room", lambda kind, path: 10)
        flags = ["--cache", "ram", "--snapshot-dir", tmp_path]
        status, line = called(train, [*arguments, *flags], monkeypatch, capsys)
        assert status == 2 and "--cache-gb 32" in line and "are free; give less" in line

    @pytest.mark.slow
    def test_torchrun(self, trained, tmp_path):
        _, _, arguments = trained
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--master_port",
            "29777",
        ]
        arguments = [*map(str, arguments), "--snapshot-dir", str(tmp_path)]
        arguments[arguments.index("--num-steps") + 1] = "1"
        done = subprocess.run(
            [*command, str(ROOT / TRAIN_PY), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "CS_scenes_1.pth").exists() and done.stdout.count("step 1/1") == 1

    def test_state_of_another_step_and_odd_files_are_kept_aside(self, trained, tmp_path):
        """The run resumes from the previous state and ends as an undisturbed one."""
        folder, _, arguments = trained
        snapshots = folder / "snapshots"
        for name in ("state_2.pt", "state_2.json", "state_4.pt", "state_4.json"):
            shutil.copy(snapshots / name, tmp_path)
        path = tmp_path / "state_4.json"
        path.write_text(path.read_text().replace('"step": 4,', '"step": 3,'))
        log = (snapshots / "log.jsonl").read_bytes()
        odd = {"log.jsonl": log + b"\x89PNG\r\n", "environment.json": b"[" * 100_000, "args.json": b"\xff"}
        for name, content in odd.items():
            (tmp_path / name).write_bytes(content)
        done = run(TRAIN_PY, *arguments, "--snapshot-dir", tmp_path, "--resume")
        assert done.returncode == 0, done.stderr
        assert "state_4.pt: damaged, skipped" in done.stdout and "continuing after step 2" in done.stdout
        assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3, 4]
        for name in ("log.jsonl", "environment.json"):
            assert (tmp_path / f"damaged_{name}").read_bytes() == odd[name]
        assert [start["step"] for start in json.loads((tmp_path / "environment.json").read_text())] == [2]
        assert (tmp_path / "damaged_state_4.pt").exists() and (tmp_path / "damaged_state_4.json").exists()
        assert same_weights(tmp_path / "CS_scenes_4.pth", snapshots / "CS_scenes_4.pth")

    def test_weights_of_a_state_of_an_earlier_version_serve_a_new_run(self, trained, tmp_path):
        folder, _, arguments = trained
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        shutil.copy(folder / "snapshots/state_2.pt", old)
        content = json.loads((folder / "snapshots/state_2.json").read_text())
        kept = {name: content[name] for name in ("step", "size", "sha256", "recipe", "validation")}
        (old / "state_2.json").write_text(json.dumps(kept))
        for flags in ([], ["--change-recipe"]):
            done = run(TRAIN_PY, *arguments, "--snapshot-dir", old, "--resume", *flags)
            line = last_line(done.stderr)
            assert done.returncode == 2 and "dropout" in line and "Traceback" not in done.stderr
        assert sorted(path.name for path in old.iterdir()) == [".lock", "state_2.json", "state_2.pt"]
        # Follow the advice of the line.
        flags = re.findall(r"--restore-from \S+ --start-iters \d+", line)[0].split()
        done = run(TRAIN_PY, *arguments, "--snapshot-dir", new, *flags)
        assert done.returncode == 0, done.stderr
        assert [entry["step"] for entry in entries(new)] == [3, 4]
        assert entries(new)[0]["loss"] == entries(folder / "snapshots")[2]["loss"]

    @pytest.mark.parametrize(
        "flags, said",
        [
            (["--num-steps", 3, "--change-recipe"], "--num-steps 3: "),
            (["--start-iters", 5, "--num-steps", 6, "--change-recipe"], "--start-iters 5: "),
            (
                ["--recurrence", 0, "--backbone", "resnet101", "--change-recipe"],
                "not a state of this network",
            ),
        ],
    )
    def test_refused_resume_changes_nothing(self, trained, flags, said, monkeypatch, capsys):
        folder, _, arguments = trained

        def files() -> dict:
            paths = [
                path for path in (folder / "snapshots").rglob("*") if path.is_file() and path.name != ".lock"
            ]
            return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

        before = files()
        resume = [*arguments, "--snapshot-dir", folder / "snapshots", "--resume", *flags]
        status, line = called(train, resume, monkeypatch, capsys)
        assert status == 2 and said in line and "state_4.pt" in line
        assert files() == before

    @pytest.mark.parametrize("name", ["log.jsonl", "args.json", "state_9.json", "state_9.pt"])
    def test_resume_never_waits_for_a_fifo(self, trained, tmp_path, name):
        folder, _, arguments = trained
        for kept in ("state_2.pt", "state_2.json"):
            shutil.copy(folder / "snapshots" / kept, tmp_path)
        os.mkfifo(tmp_path / name)
        done = run(TRAIN_PY, *arguments, "--snapshot-dir", tmp_path, "--resume")
        assert done.returncode == 2 and f"{name} is a FIFO, not a file" in last_line(done.stderr)
        assert {path.name for path in tmp_path.iterdir()} == {"state_2.pt", "state_2.json", name}

    def test_resume_with_other_pictures_is_refused(self, trained, scenes, monkeypatch, capsys):
        folder, _, arguments = trained
        write_pair(scenes, "train", 77, (48, 64))
        flags = ["--data-dir", scenes, "--snapshot-dir", folder / "snapshots", "--resume"]
        status, line = called(train, [*arguments, *flags], monkeypatch, capsys)
        assert status == 2 and "--data-dir" in line

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_broken_picture_met_later_ends_with_2_and_the_state_saved(self, scenes, tmp_path, processes):
        path = scenes / "leftImg8bit/train/ulm/ulm_000000_000003_leftImg8bit.png"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        flags = [flag for flag in TRAIN if flag not in ("--gpu", "cpu")]
        done = run(
            TRAIN_PY, "--data-dir", scenes, *flags, "--nproc", processes, "--num-steps", 9,
            "--random-seed", 1, "--snapshot-dir", tmp_path, "--print-frequency", 1,
        )  # fmt: skip
        assert done.returncode == 2
        assert path.name in last_line(done.stderr) and "Traceback" not in done.stderr
        steps = len(entries(tmp_path))
        assert steps >= 1 and (tmp_path / f"state_{steps}.json").exists()


@pytest.fixture(scope="module")
def evaluated(trained):
    """Evaluate random weights by tiles; return the folder, the output, the arguments and result.txt."""
    folder = trained[0] / "evaluated"
    folder.mkdir()
    model = SmallNetwork(19)
    fill(model)
    torch.save(model.state_dict(), folder / "weights.pth")
    arguments = ["--data-dir", trained[0] / "data", "--restore-from", folder / "weights.pth"]
    arguments += ["--input-size", "33,33"]
    done = run(EVALUATE_PY, *arguments, *TINY)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, arguments, json.loads((folder / "result.txt").read_text())


class TestEvaluation:
    def test_result_agrees_with_the_pictures_it_wrote(self, evaluated):
        folder, output, arguments, result = evaluated
        data = arguments[1]
        names = sorted(os.listdir(folder / "outputs"))
        assert names == [f"ulm_000000_{number:06d}.png" for number in range(5)]
        confusion = np.zeros((19, 20), int)
        for number, name in enumerate(names):
            picture = Image.open(folder / "outputs" / name)
            assert picture.mode == "P"
            assert picture.getpalette()[:57] == [value for color in CITYSCAPES.colors for value in color]
            ids = cv2.imread(
                str(data / f"gtFine/val/ulm/ulm_000000_{number:06d}_gtFine_labelIds.png"),
                cv2.IMREAD_GRAYSCALE,
            )
            for label in CITYSCAPES.classes:
                confusion[label.train_id] += np.bincount(np.asarray(picture)[ids == label.id], minlength=20)
        confusion = confusion[:, :19]
        assert (confusion.sum(0) > 0).sum() > 3  # no result of a constant
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        iou = confusion.diagonal() / union
        assert confusion.tolist() == result["confusion"]
        np.testing.assert_allclose(np.array(result["IU_array"], float), iou)
        assert result["meanIU"] == pytest.approx(iou.mean()) == pytest.approx(mean_of(output), abs=1e-4)
        assert result["averageScoreClasses"] == pytest.approx(result["meanIU"])
        assert {"averageScoreInstClasses", "averageScoreCategories", "averageScoreInstCategories"} < set(
            result
        )

    @pytest.mark.parametrize("flags", [["--nproc", 2], ["--nproc", 3], ["--gpu", "cpu", "--batch-size", 3]])
    @pytest.mark.slow
    def test_processes_and_batches_change_nothing(self, evaluated, tmp_path, flags):
        _, _, arguments, result = evaluated
        others = [flag for flag in TINY if flag not in ("--gpu", "cpu")]
        done = run(EVALUATE_PY, *arguments, *others, *flags, "--output-dir", tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "result.txt").read_text()) == result
        assert len(os.listdir(tmp_path / "outputs")) == 5

    @pytest.mark.parametrize("flags", [["--whole"], ["--whole", "1"], ["--scales", "0.75,1", "--flip"]])
    def test_other_ways_to_predict(self, evaluated, tmp_path, flags, monkeypatch, capsys):
        _, _, arguments, result = evaluated
        arguments = [*arguments, *TINY, *flags, "--output-dir", tmp_path]
        assert called(evaluate, arguments, monkeypatch, capsys)[0] == 0
        assert json.loads((tmp_path / "result.txt").read_text())["confusion"] != result["confusion"]

    def test_whole_with_a_false_boolean_is_tiles(self, evaluated, tmp_path, monkeypatch, capsys):
        _, _, arguments, result = evaluated
        arguments = [*arguments, *TINY, "--whole", "False", "--output-dir", tmp_path]
        assert called(evaluate, arguments, monkeypatch, capsys)[0] == 0
        assert json.loads((tmp_path / "result.txt").read_text()) == result

    @pytest.mark.parametrize("flags", [["--tile-batch", 3], ["--num-workers", 2]])
    def test_tiles_at_once_and_workers_change_nothing(self, evaluated, tmp_path, flags, monkeypatch, capsys):
        _, _, arguments, result = evaluated
        arguments = [*arguments, *TINY, *flags, "--output-dir", tmp_path]
        assert called(evaluate, arguments, monkeypatch, capsys)[0] == 0
        found = json.loads((tmp_path / "result.txt").read_text())
        assert np.abs(np.subtract(found["confusion"], result["confusion"])).sum() <= 4  # rounding

    def test_random_weights(self, trained, tmp_path, monkeypatch, capsys):
        arguments = ["--data-dir", trained[0] / "data", *TINY, "--whole", "--output-dir", tmp_path]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        assert flags_of.exit_status(evaluate.main) == 0
        assert "evaluating random weights" in capsys.readouterr().out


class TestWrongUsage:
    """Wrong usage has exit status 2 and a last line that names the flag or file, and nothing is written."""

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--data-dir", "nowhere"], ["nowhere: no such directory"]),
            (["--data-list", "nowhere.lst"], ["nowhere.lst"]),
            (["--restore-from", "nowhere.pth"], ["nowhere.pth: no such file"]),
            (["--input-size", "0,33"], ["--input-size"]),
            (["--input-size", "33x33"], ["--input-size"]),
            (["--batch-size", "0"], ["--batch-size"]),
            (["--batch-size", "3", "--nproc", "2"], ["--batch-size 3", "2 processes"]),
            (["--model", "danet"], ["--model", "ccnet"]),
            (["--backbone", "vgg16"], ["--backbone"]),
            (["--gpu", "977"], ["--gpu 977"]),
            (["--gpu", "a"], ["--gpu a"]),
            (["--gpu", "0", "--nproc", "2"], ["--nproc"]),
            (["--learning-rate", "0"], ["--learning-rate"]),
            (["--learning-rate", "nan"], ["--learning-rate"]),
            (["--weight-decay", "inf"], ["--weight-decay"]),
            (["--input-size", "8,33"], ["--input-size 8,33", "9,9"]),
            (["--ignore-label", "40000"], ["--ignore-label"]),
            (["--num-classes", "300"], ["--num-classes"]),
            (["--num-steps", "-1"], ["--num-steps"]),
            (["--start-iters", "4"], ["--start-iters"]),
            (["--ohem", "maybe"], ["--ohem"]),
            (["--abn", "inplace", "--nproc", "2"], ["--abn inplace", "--abn torch"]),
            (["--amp", "fp16"], ["--amp fp16", "bf16"]),
            (["--grad-accum", "3"], ["--batch-size 2", "3 parts"]),
            (["--class-weights", "1,2"], ["--class-weights", "has 2 weights", "19 classes"]),
            (["--class-weights", "1,-2"], ["--class-weights"]),
            (["--ema", "1"], ["--ema"]),
            (["--backend", "apex"], ["--backend apex"]),
            (["--val-every", "2", "--val-list", "nowhere.lst"], ["nowhere.lst"]),
            (["--keep-states", "0"], ["--keep-states"]),
            (["--cache", "tape"], ["--cache", "ram"]),
            (["--cache", "ram", "--cache-gb", "0"], ["--cache-gb"]),
            (["--classes", "nowhere.tsv"], ["nowhere.tsv", "--classes"]),
            (["--unknown"], ["--unknown"]),
            (["--learning-rate", "1e39"], ["--learning-rate", "1e-37 to 3e+38"]),
            (["--batch-size", "99999999999999999998"], ["--batch-size", "1 to 65536"]),
            (["--input-size", "1000000,1000000"], ["--input-size", "32768"]),
            (["--input-size", "32768,32768", "--batch-size", "64"], ["--input-size", "GiB of memory"]),
            (["--recurrence", "1000000000"], ["--recurrence", "0 to 100"]),
            (["--num-workers", "1000000000"], ["--num-workers", "0 to 1024"]),
            (["--nproc", "1000000000"], ["--nproc", "1 to 1024"]),
            (["--random-seed", str(2**63)], ["--random-seed", str(2**63 - 1)]),
            (["--power", "1e38"], ["--power", "at most 100"]),
            (["--grad-accum", "1_0"], ["--grad-accum", "'1_0'"]),
            (["--gpu", "0_0"], ["--gpu 0_0"]),
        ],
    )
    def test_train(self, flags, words, scenes, tmp_path, monkeypatch, capsys):
        cpu = [] if {"--gpu", "--nproc"} & set(flags) else ["--gpu", "cpu"]
        base = [
            "--data-dir",
            scenes,
            *TRAIN[2:],
            *cpu,
            "--num-steps",
            4,
            "--snapshot-dir",
            tmp_path / "snapshots",
        ]
        status, line = called(train, [*base, *flags], monkeypatch, capsys)
        assert status == 2
        for word in words:
            assert word in line
        assert not (tmp_path / "snapshots").exists()

    @pytest.mark.parametrize("name", ["CS_scenes_4.pth", "CS_scenes_best.pth", "log.jsonl"])
    def test_snapshots_replace_no_input(self, trained, tmp_path, name, monkeypatch, capsys):
        folder, _, arguments = trained
        own = tmp_path / name
        own.write_bytes((folder / "snapshots/CS_scenes_4.pth").read_bytes())
        (tmp_path / "link").mkdir()
        (tmp_path / "link/weights.pth").symlink_to(own)
        for path in (own, tmp_path / "link/weights.pth"):
            flags = ["--restore-from", path, "--snapshot-dir", tmp_path]
            status, line = called(train, [*arguments, *flags], monkeypatch, capsys)
            assert status == 2 and "--snapshot-dir" in line and f"would replace its own input {own}" in line
        assert sorted(os.listdir(tmp_path)) == sorted([name, "link"])

    def test_snapshots_beside_the_weights_they_start_from(self, trained, tmp_path, monkeypatch, capsys):
        folder, _, arguments = trained
        own = tmp_path / "CS_scenes_60000.pth"  # that this run does not write
        own.write_bytes((folder / "snapshots/CS_scenes_4.pth").read_bytes())
        before = own.read_bytes()
        flags = ["--restore-from", own, "--snapshot-dir", tmp_path, "--num-steps", 1]
        assert called(train, [*arguments, *flags], monkeypatch, capsys)[0] == 0
        assert own.read_bytes() == before and (tmp_path / "CS_scenes_1.pth").exists()

    def test_snapshot_directory_that_is_a_file(self, scenes, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").touch()
        arguments = ["--data-dir", scenes, *TRAIN, "--snapshot-dir", tmp_path / "file"]
        status, line = called(train, arguments, monkeypatch, capsys)
        assert status == 2 and "--snapshot-dir" in line

    def test_ids_that_do_not_match_the_started_processes(self, scenes, tmp_path, monkeypatch, capsys):
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        arguments = ["--data-dir", scenes, *TRAIN[2:], "--gpu", "0,1", "--snapshot-dir", tmp_path]
        status, line = called(train, arguments, monkeypatch, capsys)
        assert status == 2 and "--gpu 0,1: names 2 GPUs, but the launcher started 1 processes" in line

    def test_output_directory_that_is_a_file(self, scenes, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").touch()
        arguments = ["--data-dir", scenes, *TINY, "--output-dir", tmp_path / "file"]
        status, line = called(evaluate, arguments, monkeypatch, capsys)
        assert status == 2 and "--output-dir" in line

    def test_checkpoint_of_another_network(self, trained, tmp_path, monkeypatch, capsys):
        folder, _, arguments = trained
        checkpoint = ["--restore-from", folder / "snapshots/CS_scenes_4.pth"]
        deeper = [*arguments, *checkpoint, "--backbone", "resnet101", "--snapshot-dir", tmp_path]
        status, line = called(train, deeper, monkeypatch, capsys)
        assert status == 2 and "CS_scenes_4.pth" in line and "--backbone" in line
        data = ["--data-dir", folder / "data", *TINY]
        for flags, word in (
            (["--backbone", "resnet101"], "--backbone"),
            (["--num-classes", "7"], "classes 19"),
        ):
            status, line = called(evaluate, [*data, *checkpoint, *flags], monkeypatch, capsys)
            assert status == 2 and "CS_scenes_4.pth" in line and word in line

    def test_fine_tuning_to_other_classes(self, trained, tmp_path, monkeypatch, capsys):
        folder, _, arguments = trained
        flags = [
            "--restore-from",
            folder / "snapshots/CS_scenes_4.pth",
            "--num-classes",
            21,
            "--num-steps",
            1,
        ]
        flags += ["--snapshot-dir", tmp_path]
        status, line = called(train, [*arguments, *flags], monkeypatch, capsys)
        assert status == 2 and "--not-restore-last" in line
        assert called(train, [*arguments, *flags, "--not-restore-last"], monkeypatch, capsys)[0] == 0

    def test_resume_with_another_recipe(self, trained, monkeypatch, capsys):
        folder, _, arguments = trained
        flags = ["--snapshot-dir", folder / "snapshots", "--resume", "--ohem", 1]
        status, line = called(train, [*arguments, *flags], monkeypatch, capsys)
        assert status == 2 and "--ohem" in line

    @pytest.mark.slow
    def test_real_exit_status_has_no_traceback_in_any_number_of_processes(self, trained):
        folder, _, arguments = trained
        flags = ["--snapshot-dir", folder / "snapshots", "--resume", "--recurrence", 1]
        flags += [*arguments[:2], *TRAIN[2:], "--num-steps", 4]
        for processes in (1, 2):
            done = run(TRAIN_PY, *flags, "--nproc", processes)
            assert done.returncode == 2 and done.stderr.count("--recurrence") == 1
            assert "Traceback" not in done.stderr and "--recurrence" in last_line(done.stderr)
