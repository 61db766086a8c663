"""The search of a prune stage: what it is told, how candidates are tried, and the ranking that it leaves."""
