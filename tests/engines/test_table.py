from tests.engines.table import PAGE, filled


def test_the_committed_table_is_that_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page
