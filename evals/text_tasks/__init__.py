if __name__ != "nmm_serve.evals.text_tasks":
    raise ImportError(
        f"{__name__!r} was picked up from the source folder because the current directory is on sys.path; "
        "import nmm_serve.evals.text_tasks, and start Python with -P (or PYTHONSAFEPATH=1) from here"
    )
