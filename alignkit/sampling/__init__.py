"""Answers drawn from models."""
