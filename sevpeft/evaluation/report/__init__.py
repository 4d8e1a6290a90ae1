"""One HTML file of a run or a comparison, to be read by people: verdict, tables, plots, answers side by side."""
