"""The schedule of block sizes."""

import pytest

from megatron_mdm.errors import UserError
from megatron_mdm.objective.block_schedule import BlockSchedule

TEXT = "0:1 1000:4 2000:32 8000:row 20000:32"


def test_a_phase_begins_after_its_number_of_iterations():
    schedule = BlockSchedule.parse(TEXT, "--flag")
    finished = [0, 999, 1000, 1999, 2000, 7999, 8000, 19_999, 20_000, 10**9]
    assert [schedule.size(n) for n in finished] == [1, 1, 4, 4, 32, 32, None, None, 32, 32]
    assert BlockSchedule.constant(8).size(5) == 8


def test_only_the_part_that_has_acted_is_compared():
    schedule = BlockSchedule.parse(TEXT, "--flag")
    assert schedule.until(0) == ()
    assert schedule.until(1000) == ((0, 1),)
    assert schedule.until(1001) == ((0, 1), (1000, 4))
    other = BlockSchedule.parse("0:1 500:1 1000:4 1500:8", "--flag")
    assert other.until(1500) == schedule.until(1500)
    assert other.until(1501) != schedule.until(1501)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin at 0"),
        ("10:4", "must begin at 0"),
        ("0:4 5:8 5:16", "must follow"),
        ("0:4 8:2 5:16", "must follow"),
        ("0:0", "takes phases START:SIZE"),
        ("0:-4", "takes phases START:SIZE"),
        ("0=4", "takes phases START:SIZE"),
        ("0:4 x:8", "takes phases START:SIZE"),
        ("0:rows", "takes phases START:SIZE"),
    ],
)
def test_what_is_no_schedule_is_refused(text, message):
    with pytest.raises(UserError, match=message) as error:
        BlockSchedule.parse(text, "--mdm-block-size-schedule")
    assert f'"{text}"' in str(error.value)
