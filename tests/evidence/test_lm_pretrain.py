"""The pre-training example: its texts, its model, that it goes on after a kill, and on two processes."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import rgd
import torch
from torch.nn import functional as F

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "lm_pretrain.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lm():
    """`examples/lm_pretrain.py` as a module."""
    spec = importlib.util.spec_from_file_location("lm_pretrain", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of some 25 pieces, for the runs to read less than the standard library."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"line {i} of {i * i} holds {i % 7} words and {i % 11} marks\n" for i in range(40_000)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def data(lm, text):
    return lm.corpus(lm.pieces_of(text), small(lm))


def small(lm):
    return lm.Size(300, 16, 1, 2, 16, 8, 3000, 1000)


def finished(command, **settings):
    done = subprocess.run(
        [sys.executable, *command], check=False, capture_output=True, text=True, env=ENVIRONMENT, **settings
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def table_of(output):
    return [line for line in output.splitlines() if line.startswith(("ERM", "KL", "MidrangeKL"))]


@pytest.fixture(scope="module")
def quick(text, tmp_path_factory):
    """Command, picture and output of the quick run."""
    path = tmp_path_factory.mktemp("quick") / "folder" / "picture.png"
    command = [EXAMPLE, "--quick", "--data", text, "--output", path]
    return command, path, finished(command)


def test_it_prints_a_row_for_each_arm_and_draws_its_picture(quick):
    _, path, output = quick
    assert [line.split("  ")[0] for line in table_of(output)] == [
        "ERM",
        "KL(tau=5.8), token",
        "MidrangeKL(1), token",
        "KL(inf, scale=-1), token",
        "KL(tau=5.8), sequence",
        "MidrangeKL(1), sequence",
        "KL(inf, scale=-1), sequence",
    ]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (EXAMPLE.parents[1] / "docs" / "lm_pretrain.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_killed_and_started_again_ends_with_the_same_numbers(quick, tmp_path):
    command, _, whole = quick
    command = [*command, "--resume", tmp_path / "runs"]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    results = tmp_path / "runs" / "results.jsonl"
    started = time.monotonic()
    while time.monotonic() - started < 60 and process.poll() is None:
        # In the middle of the third training or later, with a checkpoint there.
        lines = results.read_text().count("\n") if results.exists() else 0
        if lines >= 2 and list(results.parent.glob("*.pt")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= results.read_text().count("\n") < 7
    assert table_of(finished(command)) == table_of(whole)
    assert not list(results.parent.glob("*.pt"))


def test_a_training_goes_on_from_its_checkpoint_and_not_from_its_beginning(lm, data, tmp_path):
    run, size = lm.Run("ERM", 0.003, 0), small(lm)
    whole = lm.train(run, size, data, rgd.ERM(), "element", every=5)

    class Killed(Exception):
        pass

    done = []

    def kill(steps):
        done.append(steps)
        if sum(done) == 13:
            raise Killed

    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        lm.train(run, size, data, rgd.ERM(), "element", path, 5, kill)
    done.clear()
    again = lm.train(run, size, data, rgd.ERM(), "element", path, 5, done.append)
    assert done[0] == 10
    assert again == whole


def test_the_checkpoint_of_a_finished_run_is_deleted_when_the_program_starts_again(lm, data, tmp_path):
    runs, arms = [lm.Run("ERM", 0.003, 0)], {"ERM": (rgd.ERM(), "element")}
    first = lm.train_all(runs, small(lm), data, arms, tmp_path)
    left = tmp_path / "ERM_0.003_0.pt"
    left.touch()  # as if killed after writing the result
    assert lm.train_all(runs, small(lm), data, arms, tmp_path) == first
    assert not left.exists()


def test_a_folder_of_other_settings_is_refused(lm, data, tmp_path):
    size = small(lm)
    arms = {"ERM": (rgd.ERM(), "element")}
    lm.train_all([lm.Run("ERM", 0.003, 0)], size, data, arms, tmp_path)
    with pytest.raises(SystemExit, match="other settings"):
        lm.train_all([lm.Run("ERM", 0.003, 0)], size._replace(layers=2), data, arms, tmp_path)


def test_two_processes_end_with_the_numbers_of_one(quick, tmp_path):
    command, _, one = quick
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = finished([*launch, *command, "--resume", tmp_path / "runs"], timeout=240, cwd=tmp_path)
    for mine, theirs in zip(table_of(two), table_of(one), strict=True):
        numbers = [[float(x.rstrip("%")) for x in line.split()[-4:]] for line in (mine, theirs)]
        # Sums in another order, and then the third digit after the point may round to another.
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11 if "%" in mine else 0.0011)
    assert (tmp_path / "runs" / "results.jsonl").read_text().count("\n") == 7


def test_tokens_give_back_their_text(lm):
    texts = [b"def f(x):\n    return x + 1\n", "žluťoučký kůň\n".encode(), bytes(range(256))]
    tokenizer = lm.Tokenizer(texts[:1], 300)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer.words)
    assert len(tokenizer.encode(texts[0])) < len(texts[0])
    with pytest.raises(ValueError, match="256"):
        lm.Tokenizer(texts, 255)


def test_the_standard_library_is_its_sources_without_tests(lm):
    texts = lm.standard_library()
    assert pathlib.Path(json.__file__).read_bytes() in texts
    assert sum(map(len, texts)) > 5_000_000


def test_training_validation_and_test_come_from_different_texts(lm):
    texts = [bytes([65 + i]) * 400 for i in range(30)]
    data = lm.corpus(texts, lm.Size(257, length=20, train_tokens=10**6, held_out_tokens=10**6))
    seen = [set(part.flatten().tolist()) for part in data[:3]]
    assert [len(part) for part in seen] == [24, 3, 3]
    assert len(set.union(*seen)) == 30
    with pytest.raises(ValueError, match="give more of it"):
        lm.corpus([b"short"], lm.Size(257))


def test_a_file_is_cut_at_lines(lm, tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"".join(b"%d\n" % i for i in range(1000)))
    pieces = lm.pieces_of(path, 100)
    assert b"".join(pieces) == path.read_bytes()
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert len(pieces) > 20


def test_the_model_sees_no_later_token(lm):
    torch.manual_seed(0)
    model = lm.GPT(small(lm))
    ids = torch.randint(300, (2, 16))
    later = ids.clone()
    later[:, 9:] = (later[:, 9:] + 1) % 300
    before, after = model(ids), model(later)
    # Eight roundings of sums over 16 numbers.
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=128 * torch.finfo(torch.float32).eps)
    assert (before[:, 9:] - after[:, 9:]).abs().amax() > 1e-3


def test_the_evaluation_is_plain(lm, data):
    torch.manual_seed(0)
    model = lm.GPT(small(lm)).double()
    found = lm.evaluate(model, data.test, batch=7)
    logits = F.linear(model(data.test)[:, :-1], model.embedding.weight).float()
    losses = F.cross_entropy(logits.transpose(1, 2), data.test[:, 1:], reduction="none").mean(1)
    worst = losses.sort().values[-round(len(losses) / 10) :]
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found["worst tenth"] == pytest.approx(worst.mean().item(), rel=1e-6)
    assert found["worst tenth"] > found["loss"]


def test_the_objective_is_the_re_weighted_cross_entropy_of_the_next_token(lm, data):
    torch.manual_seed(0)
    pretraining = lm.Pretraining(small(lm), rgd.KL(5.0), "sample")
    ids = data.train[:4]
    logits = F.linear(pretraining.model(ids)[:, :-1], pretraining.model.embedding.weight)
    expected = rgd.torch.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], weighting=rgd.KL(5.0), per="sample"
    )
    torch.testing.assert_close(pretraining(ids), expected, rtol=300 * torch.finfo(torch.float32).eps, atol=0)
    assert pretraining.criterion.linear is pretraining.model.embedding


def test_the_rate_is_chosen_on_validation_whatever_the_test_says(lm):
    def result(validation, loss):
        ends = {"validation": validation, "loss": loss, "accuracy": 0.5, "worst tenth": loss + 1}
        return {**ends, "curve": [[1, validation]]}

    results = {
        lm.Run("ERM", 0.1, 0): result(float("nan"), 1.0),
        lm.Run("ERM", 0.2, 0): result(3.0, 5.0),
        lm.Run("ERM", 0.2, 1): result(4.0, 6.0),
        lm.Run("ERM", 0.3, 0): result(3.6, 2.0),
    }
    (row,) = lm.rows_of(results)
    assert (row.learning_rate, row.validation, row.loss, row.worst) == (0.2, 3.5, 5.5, 6.5)


# --- with a reference model ---


@pytest.fixture(scope="module")
def polluted(lm, text):
    return lm.corpus(lm.pieces_of(text), small(lm), polluted=0.5, reference=True)


def test_half_of_the_training_sequences_are_shuffled_and_no_others(lm, text, polluted):
    clean = lm.corpus(lm.pieces_of(text), small(lm), reference=True)
    changed = (clean.train != polluted.train).any(1)
    assert changed.sum() == round(0.5 * len(clean.train))
    for name in ("validation", "test", "clean"):
        assert torch.equal(getattr(clean, name), getattr(polluted, name))
    decode = clean.tokenizer.decode
    for before, after in zip(clean.train[changed], polluted.train[changed], strict=True):
        # What is left of the shuffled characters, which take more tokens.
        rest = list(decode(before.tolist()))
        for character in decode(after.tolist()):
            rest.remove(character)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1\.5"):
        lm.corpus(lm.pieces_of(text), small(lm), polluted=1.5)


def test_the_scoring_goes_on_where_it_was_stopped(lm, polluted, tmp_path):
    torch.manual_seed(0)
    model, rows = lm.GPT(small(lm)), polluted.train[:20]
    whole, part = tmp_path / "whole", tmp_path / "part"
    lm.score(model, rows, whole, 8)
    losses = torch.frombuffer(bytearray(whole.read_bytes()), dtype=torch.float32).view(20, 15)
    logits = F.linear(model(rows)[:, :-1], model.embedding.weight).detach()
    expected = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)

    # Seven sequences and a half, as a kill may leave it. What is there is not computed again.
    marked = losses[:7].clone()
    marked[0] = -1.0
    part.write_bytes(marked.numpy().tobytes() + whole.read_bytes()[: 4 * 7])
    lm.score(model, rows, part, 8)
    again = torch.frombuffer(bytearray(part.read_bytes()), dtype=torch.float32).view(20, 15)
    assert torch.equal(again[:7], marked)
    torch.testing.assert_close(again[7:], losses[7:], rtol=0, atol=1e-5)


def test_the_losses_of_the_reference_are_made_once_and_read_then(lm, polluted, tmp_path):
    file, size = tmp_path / "folder" / "losses", small(lm)
    losses = lm.reference_losses(file, size, polluted, 0.01)
    assert losses.shape == (len(polluted.train), 15)
    assert sorted(path.name for path in file.parent.iterdir()) == ["losses", "losses.json"]
    file.write_bytes((losses + 1).numpy().tobytes())
    assert torch.equal(lm.reference_losses(file, size, polluted, 0.01), losses + 1)
    other = polluted._replace(train=polluted.train.flip(0))
    with pytest.raises(SystemExit, match="another text or model: name another file"):
        lm.reference_losses(file, size, other, 0.01)


def test_training_compares_each_sequence_with_its_own_reference(lm, polluted, monkeypatch):
    reference = torch.rand(len(polluted.train), 15)
    rows, seen = polluted.train, []

    def forward(self, ids, reference=None):
        seen.append((ids, reference))
        return self.criterion(self.model(ids), ids, reference=reference)

    monkeypatch.setattr(lm.Pretraining, "forward", forward)
    data = polluted._replace(reference=reference)
    lm.train(lm.Run("Rho-1", 0.003, 0), small(lm), data, rgd.Excess(rgd.CVaR(0.5)), "element")
    assert len(seen) == len(rows) // 8
    for ids, own in seen:
        for sequence, losses in zip(ids, own, strict=True):
            places = (rows == sequence).all(1).nonzero().flatten().tolist()
            assert any(torch.equal(reference[place], losses) for place in places)


def test_the_run_with_a_reference_prints_a_row_for_each_arm(text, tmp_path):
    command = [EXAMPLE, "--quick", "--data", text, "--output", tmp_path / "picture.png", "--polluted", "0.5"]
    output = finished([*command, "--reference", tmp_path / "losses"])
    arms = [line.split("  ")[0] for line in output.splitlines() if "0.003 " in line]
    assert arms == ["ERM", "Rho-1(0.5), token", "Rho-1(0.5), sequence", "KL(scale=-3), sequence"]
    assert (tmp_path / "losses").exists()
