"""Rows, checks and batch layouts."""
