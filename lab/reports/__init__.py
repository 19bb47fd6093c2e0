"""What a run leaves for people: HTML pages with plots, tables on a terminal, progress, files."""
