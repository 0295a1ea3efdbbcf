"""What other libraries compute of the same numbers; each module needs the library that it is named after."""
