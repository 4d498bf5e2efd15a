"""The recipe language: what an author may write, and what is told when it is wrong. Knows files only as bytes."""
