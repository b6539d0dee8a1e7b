"""Estimates of memory and speed on given devices."""
