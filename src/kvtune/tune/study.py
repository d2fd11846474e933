"""The Optuna study behind a run: ask and tell, kept in a journal so that an interrupted run resumes.

Optuna proposes (TPE with constraints); what a proposal is worth is decided elsewhere. The journal is
opened under a lock of the operating system, which a killed process cannot leave behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from kvtune.errors import MissingExtraError, UsageError
from kvtune.tune.space import SearchSpace
from kvtune.tune.trial import Status, Trial

__all__ = ["Study", "check_output", "has_study", "locked_folder"]

JOURNAL = "study.journal"
NAME = "kvtune"
_RECORD, _FINGERPRINT = "record", "fingerprint"
STARTUP_TRIALS = 6
LOCK_TRIES = 20
"""Each loses against a run that ends at that very moment."""


@contextlib.contextmanager
def locked_folder(folder: Path) -> Generator[None]:
    """Create the folder if needed and hold it. UsageError if it cannot be written or is in use."""
    try:
        descriptor = _locked(folder, folder / ".lock")
    except OSError as error:
        raise UsageError(
            f"cannot write to the output folder {folder}: {error.strerror or error}; choose another --out"
        ) from error
    if descriptor is None:
        raise UsageError(f"another run is writing to {folder}; wait or choose another --out")
    try:
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _locked(folder: Path, path: Path) -> int | None:
    """A descriptor that holds the lock file at `path`; None where another run does. OSError as it comes."""
    for _ in range(LOCK_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # a run that ended just now removed its empty folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # its last holder removed it meanwhile: a newer file may be another run's
    return None


def check_output(folder: Path, *, resume: bool) -> None:
    """Refuse an output folder before any work is done: not writable, in use, or holding another state."""
    created = not folder.exists()
    try:
        with locked_folder(folder):
            _check_resumable(folder, folder / JOURNAL, resume=resume)
    finally:
        if created and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def has_study(folder: Path) -> bool:
    """Whether `folder` holds a study that `resume` would continue."""
    return (folder / JOURNAL).exists()


class Study:
    """Trials of one run. `open` continues a journal or starts one; `ask` and `tell` alternate."""

    def __init__(self, study: Any, space: SearchSpace) -> None:
        self._study = study
        self._space = space
        self._choices = space.choices()
        self._open: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path, space: SearchSpace, *, fingerprint: str, resume: bool, seed: int) -> Study:
        """UsageError when there is nothing to resume, or it was started for something else, or an
        unfinished study would be lost."""
        optuna = _optuna()
        path = folder / JOURNAL
        _check_resumable(folder, path, resume=resume)
        if resume:
            _drop_half_line(path)
        else:
            path.unlink(missing_ok=True)
        with _undamaged(path):
            study = _load(optuna, path, seed)
            found = cls(study, space)
            found.trials()
        known = study.user_attrs.get(_FINGERPRINT)
        if known not in (None, fingerprint):
            raise UsageError(
                f"the study in {folder} was started for another model, workload or settings; "
                "repeat its command or choose another --out"
            )
        study.set_user_attr(_FINGERPRINT, fingerprint)
        found._requeue_interrupted(optuna)
        return found

    def _requeue_interrupted(self, optuna: Any) -> None:
        running = optuna.trial.TrialState.RUNNING
        for trial in self._study.get_trials(deepcopy=False, states=(running,)):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if set(trial.params) == set(self._choices):
                self._study.enqueue_trial(trial.params)

    def trials(self) -> list[Trial]:
        """Every told trial, oldest first."""
        found = [t.user_attrs.get(_RECORD) for t in self._study.get_trials(deepcopy=False)]
        return [Trial.from_dict(record) for record in found if record is not None]

    def enqueue(self, config: Mapping[str, Any]) -> None:
        """Make `config` the next proposal, unless it was proposed before."""
        params = {k.name: text for k in self._space.knobs
                  for text, value in self._choices[k.name].items() if value == config[k.name]}  # fmt: skip
        self._study.enqueue_trial(params, skip_if_exists=True)

    def ask(self) -> tuple[int, dict[str, Any]]:
        """The next proposal: its number and configuration."""
        optuna = _optuna()
        trial = self._study.ask(
            {n: optuna.distributions.CategoricalDistribution(list(c)) for n, c in self._choices.items()}
        )
        self._open[trial.number] = trial
        return trial.number, {n: self._choices[n][text] for n, text in trial.params.items()}

    def next_number(self) -> int:
        """The number that `add` will give."""
        return len(self._study.get_trials(deepcopy=False))

    def add(self, trial: Trial) -> None:
        """Keep a trial that was not proposed here and lies outside of the knobs' values: the sampler leaves
        it out, `trials` does not."""
        optuna = _optuna()
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.FAIL, user_attrs={_RECORD: trial.to_dict()}
            )
        )

    def skip(self, number: int) -> None:
        """Close a proposal that is not worth a trial: proposed before, or beaten by its size alone."""
        self._study.tell(self._open.pop(number), state=_optuna().trial.TrialState.PRUNED)

    def tell(self, trial: Trial, *, value: float | None) -> None:
        """Report a finished trial. `value`: the objective where it was measured, infeasible or not."""
        state = _optuna().trial.TrialState
        open_trial = self._open.pop(trial.number)
        open_trial.set_user_attr(_RECORD, trial.to_dict())
        if trial.status is Status.FAILED:
            self._study.tell(open_trial, state=state.FAIL)
        elif trial.status is Status.PRUNED or value is None:
            self._study.tell(open_trial, state=state.PRUNED)
        else:
            open_trial.set_constraint("feasible", -1.0 if trial.status is Status.COMPLETE else 1.0)
            self._study.tell(open_trial, value)


def _load(optuna: Any, path: Path, seed: int) -> Any:
    """The Optuna study that the journal holds, or a new one."""
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_HeldByFolder())
    )
    names = {s.study_name for s in storage.get_all_studies()}
    done = len(storage.get_all_trials(storage.get_study_id_from_name(NAME))) if NAME in names else 0
    sampler = optuna.samplers.TPESampler(
        # a resumed run must not propose what the first one began with; Optuna's seeds have 32 bit
        seed=(seed + done) % 2**32,
        n_startup_trials=STARTUP_TRIALS,
    )
    return optuna.create_study(
        storage=storage, study_name=NAME, sampler=sampler, direction="minimize", load_if_exists=True
    )


@contextlib.contextmanager
def _undamaged(path: Path) -> Generator[None]:
    """What Optuna and we raise over a journal that something else wrote into, as one UsageError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise UsageError(
            f"the study in {path} is damaged ({type(error).__name__}) and cannot be resumed; "
            "remove the file or choose another --out"
        ) from error


def _check_resumable(folder: Path, path: Path, *, resume: bool) -> None:
    if resume and not path.exists():
        raise UsageError(f"nothing to resume in {folder}; start without --resume")
    is_unfinished = path.exists() and path.stat().st_size > 0 and not (folder / "result.json").exists()
    if not resume and is_unfinished:
        raise UsageError(f"{folder} holds an unfinished study; add --resume or choose another --out")


def _drop_half_line(path: Path) -> None:
    """A process killed while writing leaves half a line, after which the journal could not be appended to."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        with path.open("r+b") as file:
            file.truncate(end)


class _HeldByFolder:
    """In place of Optuna's lock file, which a killed process leaves behind: the folder is locked already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _optuna() -> Any:
    """The optional extra, loaded on first use: settings and records of this package need none."""
    try:
        optuna = importlib.import_module("optuna")
        importlib.import_module("optuna.storages.journal")
    except ImportError as error:
        raise MissingExtraError("kvtune tune", "tune") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
