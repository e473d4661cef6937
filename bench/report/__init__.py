"""What comes of it: results files, tables on the terminal, plots."""
