"""Evaluation, figures, reports, explorer and export of finished runs."""
