"""The report: what it says, how it is drawn, its template and style sheet, and the files that it becomes."""
