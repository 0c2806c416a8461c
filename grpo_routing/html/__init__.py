"""report.html: one self-contained page of an experiment. page.py puts the sections together; a section is a module and a template."""
