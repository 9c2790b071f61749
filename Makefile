# One-word commands; each is a script in scripts/ that installs what it needs into $ISOJOB_VENV
# (.venv) and takes arguments as ARGS="...".
.PHONY: demo test bench lint analyse format fuzz soak docs clean
demo test bench lint analyse format fuzz soak docs clean:
	@scripts/$@.sh $(ARGS)
