"""Examples to start from, each a short program; the tests run them."""
