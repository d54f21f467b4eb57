if __name__ != "nmm_serve.evals":
    raise ImportError(
        f"{__name__!r} was picked up from the source folder because the current directory is on sys.path; "
        "import nmm_serve.evals, and start Python with -P (or PYTHONSAFEPATH=1) from here"
    )
