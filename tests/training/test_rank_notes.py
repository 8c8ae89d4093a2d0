"""Which ranks are missing, judged by their notes alone: no process is started, no second is waited."""

from __future__ import annotations

import dataclasses

import pytest

from dpo_cli.training.collectives import Exchanges, Operation
from dpo_cli.training.rank_notes import Note, Notes

PATIENCE, GRACE = 10.0, 3.0
EVERYBODY = (0, 1, 2)


def has_begun(number: int, group: str = "world") -> Exchanges:
    """What a rank notes that has begun so many operations, all of which ended."""
    return Exchanges({group: number})


def waits_for(
    number: int, group: str = "world", ranks: tuple[int, ...] = EVERYBODY, what: str = "all_gather"
) -> Exchanges:
    """What a rank notes that waits for an operation."""
    return Exchanges({group: number}, (Operation(group, number, f"{what}, operation {number}", ranks),))


class Machine:
    """Three ranks of which rank 0 looks at the others, and a clock."""

    def __init__(self, rank: int = 0, keeper: int | None = 0) -> None:
        self.now = 0.0
        self.written = {number: Note(number, host="here", pid=100 + number) for number in range(3)}
        self.notes = Notes(rank, 3, keeper, self.now)

    def pass_seconds(self, seconds: float, silent: tuple[int, ...] = (), still: tuple[int, ...] = ()) -> None:
        """Let all ranks but some write a note every second, and all but some exchange something."""
        for _ in range(round(seconds)):
            self.now += 1
            for rank, note in self.written.items():
                if rank not in silent:
                    exchanged = note.exchanged + (rank not in still)
                    self.written[rank] = dataclasses.replace(note, count=note.count + 1, exchanged=exchanged)
            self.notes.take(self.written.values(), self.now)

    def change(self, *ranks: int, **values: object) -> None:
        for rank in ranks:
            self.written[rank] = dataclasses.replace(self.written[rank], **values)

    def missing(self, silence: float = PATIENCE):
        return self.notes.missing(self.now, silence, GRACE, PATIENCE)


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


def test_who_gets_no_further_while_others_wait_for_it_hangs(machine):
    machine.change(0, 1, 2, doing="", step=7)
    machine.change(0, 2, exchanges=waits_for(40))
    machine.change(1, exchanges=has_begun(39))
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE, still=EVERYBODY)
    assert machine.missing() is None
    machine.pass_seconds(1, still=EVERYBODY)
    assert machine.missing().ranks == {1}
    assert machine.missing().what == ("rank 1 (process 101 on here) hangs: it has got no further for 11.0 s, at step 7")


def test_who_did_not_come_out_of_a_step_that_others_have_left_hangs(machine):
    machine.change(0, 2, doing="while a checkpoint was saved", step=7, exchanges=waits_for(41))
    machine.change(1, doing="", step=7, exchanges=has_begun(40))
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE + 2, still=EVERYBODY)
    assert machine.missing().ranks == {1}
    assert machine.missing().what.endswith(" s, at step 7")


@pytest.mark.parametrize("doing", ["while a checkpoint was saved", "while held-out pairs were scored"])
def test_outside_of_steps_it_is_said_what_the_one_that_hangs_was_doing(machine, doing):
    machine.change(1, 2, doing=doing, exchanges=waits_for(3))
    machine.change(0, doing=doing, exchanges=has_begun(2))
    machine.pass_seconds(PATIENCE + 2, still=EVERYBODY)
    assert machine.missing().ranks == {0}
    assert machine.missing().what.endswith(f" s, {doing}, before step 1")


@pytest.mark.parametrize(
    "spared",
    [
        pytest.param({"doing": None}, id="it does what may take any time: it loads, or prepares data"),
        pytest.param({"exchanges": has_begun(40)}, id="none is behind: each may compute for long"),
    ],
)
def test_none_is_taken_to_hang_that_may_have_a_reason(machine, spared):
    machine.change(0, 1, 2, doing="", exchanges=waits_for(40))
    machine.change(1, exchanges=has_begun(39))
    machine.change(*((0, 1, 2) if "exchanges" in spared else (1,)), **spared)
    machine.pass_seconds(1)
    machine.pass_seconds(10 * PATIENCE, still=EVERYBODY)
    assert machine.missing() is None


def test_one_that_gets_on_excuses_all_that_wait_for_it(machine):
    machine.change(0, 2, doing="", exchanges=waits_for(40))
    machine.change(1, doing="")
    machine.pass_seconds(10 * PATIENCE, still=(0, 2))
    assert machine.missing() is None


def test_one_that_computes_for_long_is_not_taken_to_hang(machine):
    machine.change(0, 1, 2, doing="", exchanges=waits_for(40))
    machine.change(1, exchanges=has_begun(39))
    for _ in range(10):
        machine.change(1, work=machine.written[1].work + 1)
        machine.pass_seconds(PATIENCE, still=EVERYBODY)
    assert machine.missing() is None
    machine.pass_seconds(2, still=EVERYBODY)
    assert machine.missing().ranks == {1}


def test_who_turns_in_circles_while_it_waits_does_not_excuse_the_one_that_hangs(machine):
    """On GPUs the host does."""
    machine.change(0, 1, 2, doing="", exchanges=waits_for(40))
    machine.change(1, exchanges=has_begun(39))
    for second in range(int(PATIENCE) + 2):
        machine.change(0, 2, work=second)
        machine.pass_seconds(1, still=EVERYBODY)
    assert machine.missing().ranks == {1}


def test_who_waits_for_one_that_hangs_is_not_blamed_by_those_that_wait_for_it(machine):
    """Rank 0 waits for rank 1 in another group of ranks than rank 1 for rank 2."""
    machine.change(0, 1, 2, doing="")
    machine.change(0, exchanges=waits_for(9, "pair", (0, 1)))
    machine.change(1, exchanges=Exchanges({"pair": 8, "world": 40}, waits_for(40).waits))
    machine.change(2, exchanges=has_begun(39))
    machine.pass_seconds(PATIENCE + 2, still=EVERYBODY)
    assert machine.missing().ranks == {2}


def test_one_that_hangs_while_its_checkpoint_is_written_aside_is_behind(machine):
    """A thread of its own waits for rank 0, which writes, and is blamed by nobody for that."""
    aside = dataclasses.replace(waits_for(4, "aside").waits[0], aside=True)
    machine.change(0, 1, 2, doing="", step=5)
    machine.change(0, exchanges=Exchanges({"world": 40, "aside": 3}, waits_for(40).waits))
    machine.change(1, exchanges=Exchanges({"world": 39, "aside": 4}, (aside,)))
    machine.change(2, exchanges=Exchanges({"world": 40, "aside": 4}, (aside, *waits_for(40).waits)))
    machine.pass_seconds(PATIENCE + 2, still=EVERYBODY)
    assert machine.missing().ranks == {1}


def test_one_that_computes_while_its_checkpoint_is_written_aside_is_waited_for(machine):
    aside = dataclasses.replace(waits_for(4, "aside").waits[0], aside=True)
    machine.change(0, 1, 2, doing="", exchanges=waits_for(40))
    for second in range(int(3 * PATIENCE)):
        machine.change(1, work=second, exchanges=Exchanges({"world": 39, "aside": 4}, (aside,)))
        machine.pass_seconds(1, still=EVERYBODY)
    assert machine.missing() is None


@pytest.mark.parametrize("doing", ["", None])
def test_where_ranks_wait_for_different_operations_it_is_said_for_which(machine, doing):
    machine.change(0, 1, 2, doing=doing, step=3, exchanges=waits_for(40))
    machine.change(1, exchanges=waits_for(40, what="barrier"))
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE, still=EVERYBODY)
    assert machine.missing() is None
    machine.pass_seconds(1, still=EVERYBODY)
    missing = machine.missing()
    assert missing.what == (
        "the ranks wait for different operations: rank 0 (process 100 on here) and 1 more for all_gather, operation 40,"
        " at step 3; rank 1 (process 101 on here) for barrier, operation 40, at step 3"
    )
    assert not missing.ranks
    assert "configuration" in missing.hint
    assert machine.notes.speaks(missing)


def test_where_ranks_wait_for_each_other_in_groups_it_is_said_for_what(machine):
    machine.change(0, 1, 2, doing="", exchanges=waits_for(40))
    machine.change(1, exchanges=Exchanges({"world": 39, "pair": 4}, waits_for(4, "pair", (1, 2), "barrier").waits))
    machine.pass_seconds(PATIENCE + 2, still=EVERYBODY)
    assert "the ranks wait for different operations: rank 0" in machine.missing().what
    assert "rank 1 (process 101 on here) for barrier, operation 4, before step 1" in machine.missing().what


def test_where_all_wait_for_the_same_operation_nobody_is_blamed(machine):
    machine.change(0, 1, 2, doing="", step=5, exchanges=waits_for(40))
    machine.pass_seconds(PATIENCE + 2, still=EVERYBODY)
    missing = machine.missing()
    assert not missing.ranks
    assert "no rank is behind, and what all wait for does not end: all_gather, operation 40, at step 5" in missing.what


def test_where_a_connection_broke_who_is_only_still_is_not_blamed(machine):
    """Then silence counts after a moment, since somebody is gone."""
    machine.change(0, 2, doing="", exchanges=waits_for(40))
    machine.change(1, doing="", exchanges=has_begun(39))
    machine.pass_seconds(1)
    machine.pass_seconds(PATIENCE, still=EVERYBODY)
    assert machine.missing(silence=1) is None
    machine.pass_seconds(2, silent=(2,), still=EVERYBODY)
    assert machine.missing(silence=1).ranks == {2}


def test_one_that_waits_since_a_moment_ago_ends_no_run(machine):
    machine.change(0, 1, 2, doing="", exchanges=waits_for(40))
    machine.change(1, exchanges=waits_for(40, what="barrier"))
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


def test_what_another_found_is_believed_also_where_nobody_is_to_blame():
    machine = Machine(rank=2)
    machine.change(0, farewell="the ranks wait for different operations", blames=(), hint="look", status=1)
    machine.pass_seconds(1)
    assert (machine.missing().what, machine.missing().hint) == ("the ranks wait for different operations", "look")


def test_who_has_to_speak_does_so_even_if_another_was_first_to_find_out():
    machine = Machine(rank=1)
    machine.change(2, farewell="rank 0 is gone", blames=(0,), status=1)
    machine.pass_seconds(1)
    assert machine.notes.speaks(machine.missing())


def test_one_that_finds_that_it_hangs_itself_leaves_it_to_the_others_to_say_so():
    speaking = {}
    for rank in (0, 1):
        machine = Machine(rank=rank)
        machine.change(1, 2, doing="", exchanges=waits_for(40))
        machine.change(0, doing="", exchanges=has_begun(39))
        machine.pass_seconds(1)
        machine.pass_seconds(PATIENCE + 1, still=EVERYBODY)
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
    note = Note(3, count=5, step=12, doing="", exchanges=waits_for(7), farewell="gone: ä", blames=(1, 2))
    for one in (note, Note(0), dataclasses.replace(note, blames=())):
        assert Note.decoded(one.encoded().encode()) == one
