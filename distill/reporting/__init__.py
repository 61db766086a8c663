"""The report: rows of measurements, and the tables, verdict, plots and HTML page made from them."""
