"""Entry points, one file a job: `python -m jobs.NAME CONFIG... [key=value ...]`.

Each file names its configuration model and the function that does the work; `_main` does what all of them
share: arguments, messages, exit codes and the JSON object on the last line of standard output.
"""
