"""Which ranks are missing, judged by their notes alone: no process is started, no second is waited."""

from __future__ import annotations

import dataclasses

import pytest

from dpo_cli.training.rank_notes import Note, Notes

PATIENCE, GRACE = 10.0, 3.0


class Machine:
    """Three ranks of which rank 0 looks at the others, and a clock."""

    def __init__(self, rank: int = 0, keeper: int | None = 0) -> None:
        self.now = 0.0
        self.written = {number: Note(number, host="here", pid=100 + number) for number in range(3)}
        self.notes = Notes(rank, 3, keeper, self.now)

    def pass_seconds(self, seconds: float, silent: tuple[int, ...] = (), still: tuple[int, ...] = ()) -> None:
        """Let all ranks but some write a note every second, and all but some get on."""
        for _ in range(round(seconds)):
            self.now += 1
            for rank, note in self.written.items():
                if rank not in silent:
                    passes = note.passes + (rank not in still)
                    self.written[rank] = dataclasses.replace(note, count=note.count + 1, passes=passes)
            self.notes.take(self.written.values(), self.now)

    def change(self, *ranks: int, **values: object) -> None:
        for rank in ranks:
            self.written[rank] = dataclasses.replace(self.written[rank], **values)

    def missing(self):
        return self.notes.missing(self.now, PATIENCE, GRACE)


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.pass_seconds(1)
    return machine


def test_while_all_give_signs_nobody_is_gone_however_long_it_takes(machine):
    machine.pass_seconds(100, still=(0, 1, 2))
    assert machine.missing() is None


def test_who_is_silent_for_longer_than_the_time_out_is_gone_and_named(machine):
    machine.change(2, step=12)
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE, silent=(2,))
    assert machine.missing() is None
    machine.pass_seconds(1, silent=(2,))
    missing = machine.missing()
    assert missing.what == ("rank 2 (process 102 on here) is gone: its last sign of life came 11.0 s ago, at step 12")
    assert missing.status == 1


def test_a_silence_that_ends_is_forgotten(machine):
    machine.pass_seconds(PATIENCE, silent=(2,))
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE, silent=(2,))
    assert machine.missing() is None


def test_who_never_gave_a_sign_is_gone_as_well():
    machine = Machine()
    del machine.written[1]
    machine.pass_seconds(PATIENCE + 1)
    assert machine.missing().what == "rank 1 is gone: it never gave a sign of life"


def test_where_the_store_does_not_answer_only_who_keeps_it_is_gone():
    """Of the others no sign could be read either."""
    machine = Machine(rank=1)
    machine.pass_seconds(1)
    machine.now += PATIENCE + 1
    assert machine.missing().ranks == {0}


def test_a_connection_to_the_store_that_broke_is_given_a_moment():
    """The rank that keeps it may simply have ended first."""
    machine = Machine(rank=1)
    machine.pass_seconds(1)
    machine.notes.lose(machine.now)
    assert machine.missing() is None
    machine.now += GRACE
    assert machine.missing().ranks == {0}


def test_where_a_launcher_keeps_the_store_no_rank_is_blamed_for_its_end():
    machine = Machine(rank=1, keeper=None)
    machine.pass_seconds(1)
    machine.notes.lose(machine.now)
    machine.now += GRACE
    assert "launcher" in machine.missing().what
    assert not machine.missing().ranks


def test_who_stands_still_in_a_step_while_others_wait_for_it_hangs(machine):
    machine.change(0, 1, 2, in_step=True, step=7)
    machine.change(0, 2, last_pass=True)
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE, still=(0, 1, 2))
    assert machine.missing() is None
    machine.pass_seconds(1, still=(0, 1, 2))
    assert machine.missing().ranks == {1}
    assert "rank 1 (process 101 on here) hangs: it has got no further for 11.0 s, at step 7" in machine.missing().what


def test_who_did_not_come_out_of_a_step_that_others_have_left_hangs(machine):
    machine.change(0, 2, in_step=True, step=8)
    machine.change(1, in_step=True, step=7, last_pass=True)
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE + 1, still=(0, 1, 2))
    assert machine.missing().ranks == {1}


@pytest.mark.parametrize(
    "spared",
    [
        pytest.param({"in_step": False, "last_pass": False}, id="one is not in a step: it saves, or loads"),
        pytest.param({"in_step": True, "last_pass": True}, id="all are equally far: maybe in a long pass"),
    ],
)
def test_none_is_taken_to_hang_that_may_have_a_reason(machine, spared):
    machine.change(0, 1, 2, in_step=True, last_pass=True)
    machine.change(1, **spared)
    machine.pass_seconds(1)
    machine.pass_seconds(10 * PATIENCE, still=(0, 1, 2))
    assert machine.missing() is None


def test_one_that_gets_on_excuses_all_that_wait_for_it(machine):
    machine.change(0, 1, 2, in_step=True)
    machine.pass_seconds(10 * PATIENCE, still=(0, 2))
    assert machine.missing() is None


def test_one_that_failed_is_named_with_its_reason_and_its_status_after_a_moment(machine):
    machine.change(1, farewell="saving failed: no space left on device", status=1)
    machine.pass_seconds(1)
    assert machine.missing() is None
    machine.pass_seconds(GRACE, silent=(1,))
    missing = machine.missing()
    assert "rank 1 (process 101 on here) ended before step 1: saving failed: no space left on device" in missing.what
    assert missing.status == 1


def test_one_that_is_done_is_not_missed(machine):
    machine.change(1, farewell="")
    machine.pass_seconds(1)
    machine.pass_seconds(10 * PATIENCE, silent=(1,))
    assert machine.missing() is None


def test_what_another_found_is_believed_at_once():
    """Else three ranks of which one is killed would name each other."""
    machine = Machine(rank=2)
    machine.change(0, farewell="rank 1 is gone", blames=(1,), status=1)
    machine.pass_seconds(1)
    missing = machine.missing()
    assert (missing.what, missing.ranks) == ("rank 1 is gone", {1})
    assert not machine.notes.speaks(missing)


def test_who_has_to_speak_does_so_even_if_another_was_first_to_find_out():
    machine = Machine(rank=1)
    machine.change(2, farewell="rank 0 is gone", blames=(0,), status=1)
    machine.pass_seconds(1)
    assert machine.notes.speaks(machine.missing())


def test_one_that_finds_that_it_hangs_itself_leaves_it_to_the_others_to_say_so():
    speaking = {}
    for rank in (0, 1):
        machine = Machine(rank=rank)
        machine.change(0, 1, 2, in_step=True, last_pass=True)
        machine.change(0, last_pass=False)
        machine.pass_seconds(1)
        machine.pass_seconds(PATIENCE + 1, still=(0, 1, 2))
        speaking[rank] = machine.notes.speaks(machine.missing())
    assert speaking == {0: False, 1: True}


@pytest.mark.parametrize(("gone", "speaker"), [(2, 0), (0, 1), (1, 0)])
def test_one_rank_of_a_machine_speaks(gone, speaker):
    """The lowest that is left."""
    speakers = []
    for rank in {0, 1, 2} - {gone}:
        machine = Machine(rank=rank, keeper=None)
        machine.pass_seconds(1)
        machine.pass_seconds(PATIENCE + 1, silent=(gone,))
        if machine.notes.speaks(machine.missing()):
            speakers.append(rank)
    assert speakers == [speaker]


def test_on_each_machine_one_speaks():
    machine = Machine(rank=1)
    machine.change(1, host="there")
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE + 1, silent=(2,))
    assert machine.notes.speaks(machine.missing())


def test_a_note_survives_the_way_through_the_store():
    note = Note(3, count=5, step=12, last_pass=True, farewell="gone: ä", blames=(1, 2))
    assert Note.decoded(note.encoded().encode()) == note
