"""`python -m hpo VERB` is `hpo VERB`."""

from hpo.run import main

if __name__ == "__main__":
    main()
