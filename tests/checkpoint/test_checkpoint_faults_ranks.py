"""A save is all or nothing: whatever fails on any rank, the save before it or the new one loads."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.checkpoint_runs import make, refusal, state_digests, train
from support.ranks import RankError, run_ranks

from alfb_dist import checkpoint
from alfb_dist.checkpoint import files

OPERATIONS = ("make_folder", "create", "write", "sync", "sync_folder", "rename")


class Killed(BaseException):
    """Stands for the end of the process; nothing in the package catches it."""


@contextmanager
def _fault(operation: str, number: int, error: BaseException | None) -> Any:
    """Make the number-th call of a file operation fail, a write after half its data; yield the number of calls."""
    real, calls = getattr(files, operation), [0]

    def faulty(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and error is not None:
            if operation == "write":
                real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
            raise error
        return real(*arguments)

    setattr(files, operation, faulty)
    try:
        yield calls
    finally:
        setattr(files, operation, real)


def _points(save: Callable[[], Any]) -> list[tuple[str, int]]:
    """Return every call of a file operation in this rank's save; of many writes the first, the last and some others."""
    points = []
    for operation in OPERATIONS:
        with _fault(operation, 0, None) as calls:
            save()
        step = 1 if operation != "write" else max(1, calls[0] // 5)
        points += [(operation, n) for n in {*range(1, calls[0] + 1, step), calls[0]} - {0}]
    return points


def _remove(save: Path) -> None:
    """Remove the save; collective."""
    dist.barrier()
    if dist.get_rank() == 0:
        files.remove(save)
    dist.barrier()


def _kill_everywhere(folder: str) -> list[tuple[str, int, str, str]]:
    """Kill a save of step 2 at every point, and one that replaces step 1 at some.

    Returns each point with the newest good save after it and the state loaded from that.
    """
    engine, balancer = make(0, 1, num_hidden_layers=2)
    train(engine, balancer, 0)
    checkpoints, loaded, found = Path(folder), {}, []

    def save(step: int, state: str) -> Path:
        return checkpoint.save(engine, balancer, checkpoints, step=step, state={"is": state})

    save(1, "old")
    points = _points(lambda: _remove(save(2, "probe")))
    replacing = [("rename", 1), ("rename", 2), ("sync_folder", 1), ("sync_folder", 2)]
    for step, (operation, number) in [(2, point) for point in points] + [(1, point) for point in replacing]:
        try:
            with _fault(operation, number, Killed()):
                save(step, "new")
        except Killed:
            path, skipped = checkpoint.newest_good(checkpoints)
            assert path is not None and skipped == []
            state = (path / "state.json").read_bytes()
            if state not in loaded:  # it has verified: a second load would be the same
                loaded[state] = checkpoint.load(engine, balancer, path)["is"]
            found.append((operation, number, path.name, loaded[state]))
        _remove(checkpoints / "step-00000002")
        if step == 1:
            save(1, "old")
    return found


def test_a_kill_at_any_point_leaves_the_old_or_the_new_save(tmp_path: Path) -> None:
    [found] = run_ranks(1, _kill_everywhere, str(tmp_path / "saves"), folder=tmp_path)
    fresh, replacing = found[:-4], found[-4:]
    assert len(fresh) > 20
    for operation, number, name, holds in fresh:
        # A save counts from its rename on; after it come the sync of checkpoints/ and the hint.
        assert (name, holds) in (("step-00000001", "old"), ("step-00000002", "new"))
        assert (holds == "new") <= (operation in ("sync_folder", "create", "write", "sync")), (operation, number)
    assert ("rename", 1, "step-00000001", "old") in fresh
    assert ("sync_folder", 2, "step-00000002", "new") in fresh
    assert replacing == [
        ("rename", 1, "step-00000001", "old"),
        ("rename", 2, "step-00000001.old", "old"),
        ("sync_folder", 1, "step-00000001", "old"),
        ("sync_folder", 2, "step-00000001", "new"),
    ]


def _fail_everywhere(folder: str) -> list[tuple[str, int, int, str, int, list[str]]]:
    """Fail a save at every point on each of two ranks; return the error, the newest save and the directories then."""
    engine, balancer = make(0, 2, num_hidden_layers=2)
    train(engine, balancer, 0)
    checkpoints = Path(folder)

    def save(step: int) -> Path:
        return checkpoint.save(engine, balancer, checkpoints, step=step, state={"step": step})

    save(1)
    mine = _points(lambda: _remove(save(2)))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    before, found = state_digests(engine, balancer), []
    for rank in (0, 1):
        for operation, number in everyone[rank]:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if rank == dist.get_rank() else None
            with _fault(operation, number, error):
                try:
                    save(2)
                    message = ""
                except checkpoint.SaveError as e:
                    message = str(e)
            path, _ = checkpoint.newest_good(checkpoints)
            assert path is not None
            names = sorted(p.name for p in checkpoints.iterdir() if p.is_dir())
            found.append((operation, number, rank, message, int(path.name[5:]), names))
            _remove(checkpoints / "step-00000002")
    assert state_digests(engine, balancer) == before
    train(engine, balancer, 1)
    assert checkpoint.load(engine, balancer, save(2)) == {"step": 2}
    return found


def test_a_full_disk_is_the_same_error_on_every_rank_and_training_goes_on(tmp_path: Path) -> None:
    first, second = run_ranks(2, _fail_everywhere, str(tmp_path / "saves"), folder=tmp_path)
    assert first == second
    assert {rank for _, _, rank, *_ in first} == {0, 1}
    hints = [point for point in first if not point[3]]
    assert {operation for operation, *_ in hints} <= {"create", "write", "sync"}, (
        "only `latest` may fail without an error"
    )
    assert all(rank == 0 and step == 2 for _, _, rank, _, step, _ in hints)
    for operation, _number, rank, message, step, names in first:
        assert names == [f"step-{s:08d}" for s in range(1, step + 1)], "nothing unfinished is left"
        if message:
            assert message.startswith(f"rank {rank}: ")
            assert "No space left on device" in message
        if message and operation in ("create", "write", "sync"):
            assert ".tmp/" in message and " of " in message and "at byte" in message, message


def _exit_while_saving(folder: str) -> None:
    engine, balancer = make(0, 2, num_hidden_layers=2)
    checkpoint.save(engine, balancer, Path(folder), step=1, state={})
    if dist.get_rank() == 1:
        files.write = lambda *_: os._exit(1)
    checkpoint.save(engine, balancer, Path(folder), step=2, state={})


def test_a_rank_that_exits_while_saving_leaves_the_save_before_it(tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(2, _exit_while_saving, str(tmp_path / "saves"), folder=tmp_path)
    assert checkpoint.newest_good(tmp_path / "saves") == (tmp_path / "saves/step-00000001", [])
    assert checkpoint.prune(tmp_path / "saves", 1) == []
    assert sorted(p.name for p in (tmp_path / "saves").iterdir()) == ["latest", "step-00000001"]


def _keep(folder: str) -> tuple[list[str], str, tuple[Path | None, list[str]]]:
    engine, balancer = make(0, 2, num_hidden_layers=2)
    for step in (1, 2, 3):
        checkpoint.save(engine, balancer, Path(folder), step=step, state={}, keep=2)
    dist.barrier()
    names = sorted(p.name for p in Path(folder).glob("step*"))
    not_json = refusal(lambda: checkpoint.save(engine, balancer, Path(folder), step=9, state={"a": {1}}))
    return names, not_json, checkpoint.agree_on_newest(Path(folder))


def test_keep_removes_older_saves_and_all_ranks_agree_on_the_newest(tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    for names, not_json, newest in run_ranks(2, _keep, str(saves), folder=tmp_path):
        assert names == ["step-00000002", "step-00000003"]
        assert "must be plain JSON" in not_json
        assert newest == (saves / "step-00000003", [])
