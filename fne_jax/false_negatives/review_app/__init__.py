"""A local web page to search a split with what was trained, and to judge its suspects."""
