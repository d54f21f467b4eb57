"""What the commands show is plain text, whatever it holds."""

from nmm_serve.cli.render import print_table

LOOKS_LIKE_MARKUP = "runs/[bold]early[/x]"


def test_title_columns_cells_and_caption_are_no_markup(capsys):
    print_table(LOOKS_LIKE_MARKUP, ["model " + LOOKS_LIKE_MARKUP], [["cell " + LOOKS_LIKE_MARKUP]], LOOKS_LIKE_MARKUP)
    assert capsys.readouterr().out.count(LOOKS_LIKE_MARKUP) == 4
