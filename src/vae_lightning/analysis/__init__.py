"""Evaluation, pictures, reports, explorer and export of finished runs."""
