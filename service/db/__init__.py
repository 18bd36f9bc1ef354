"""The two stores behind one interface. Knows no step."""
