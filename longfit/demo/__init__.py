"""The demo: a long document, a question about its middle, and a small memory budget."""
