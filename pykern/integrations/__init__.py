"""Adapters to other projects' programs; each module says which package it needs."""
