import errno

import pytest

from numprune.errors import NumpruneError, reported


def raising(error: Exception, *, debug: bool = False) -> None:
    with reported(debug=debug):
        raise error


@pytest.mark.parametrize("error", [NumpruneError("no such model"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_a_user_can_mend_is_a_message_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as ended:
        raising(error)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(type(error)):
        raising(error, debug=True)


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"), OSError(errno.EIO, "I/O error")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        raising(error)
