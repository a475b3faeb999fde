"""The report: a page of every run and one of all of them, their plots, and the data of the plots."""
