"""The run report: one static folder of pages, data and small pictures that a browser opens from anywhere."""
