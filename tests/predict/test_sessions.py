"""Conversations seen through prefixes alone."""

from __future__ import annotations

import pytest

from kvtune.errors import UsageError
from kvtune.predict import PrefixSessions


def test_turns_of_one_conversation_share_a_name_and_others_do_not() -> None:
    sessions = PrefixSessions()
    sessions.add(["a1", "a2"])
    sessions.add(["b1", "b2"])
    again = sessions.look(["a1", "a2", "a3", "a4"])
    assert again.session == sessions.look(["a1", "a2"]).session
    assert again.session != sessions.look(["b1", "b2", "b3"]).session
    assert again.num_known == 2


def test_a_system_prompt_shared_by_many_is_no_conversation() -> None:
    sessions = PrefixSessions()
    for user in range(20):
        sessions.add(["system", f"u{user}", f"u{user}-2"])
    names = {sessions.look(["system", f"u{user}", "next"]).session for user in range(20)}
    assert len(names) == 20
    assert "system" not in names


def test_a_prompt_without_a_full_block_has_no_name() -> None:
    sessions = PrefixSessions()
    sessions.add([])
    assert sessions.look([]).session is None


def test_looking_changes_nothing() -> None:
    sessions = PrefixSessions()
    sessions.look(["a", "b"])
    assert len(sessions) == 0


def test_memory_is_bounded_and_the_longest_unseen_leave_first() -> None:
    sessions = PrefixSessions(max_blocks=4)
    sessions.add(["a", "b"])
    sessions.add(["c", "d"])
    sessions.add(["a", "e"])
    assert len(sessions) == 4
    assert sessions.look(["a"]).num_known == 1
    assert sessions.look(["b"]).num_known == 0
    with pytest.raises(UsageError):
        PrefixSessions(max_blocks=0)
