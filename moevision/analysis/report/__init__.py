"""`moevision analyze`: the stages, the folder and the page of the report."""
