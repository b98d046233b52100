"""A table of a notebook: text in columns, and HTML in which a cell is text whatever it holds."""

from moevision.analysis import Table


def test_a_table_is_text_and_html():
    table = Table(["expert", "share"], [["E0", "9 %"], ["<b>", 16]])
    assert str(table) == "expert  share\nE0        9 %\n<b>        16"
    html = table._repr_html_()
    assert html.count("<tr>") == 3
    assert "&lt;b&gt;</td>" in html
