"""The paged key-value cache: blocks and tables (`pool`, `manager`), how keys and values are stored
(`layouts/`), and the memory that attention layers talk to (`memory`)."""
