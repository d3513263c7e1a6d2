# Sourced by the four speculate_*.sh: where a model's weights are, or what makes them.
PYTHON=${PYTHON:-python}
CHECKPOINTS=${CHECKPOINTS:-checkpoints}
COMPILE=${COMPILE---compile} # COMPILE= leaves it out

# weights REPO FORMAT: the path of its weights; where they are missing, ends with the commands that make them.
weights() {
    case $2 in
        bf16) file=model.safetensors quantize= ;;
        int8) file=model_int8.safetensors quantize="--mode int8" ;;
        int4) file=model_int4.g32.safetensors quantize="--mode int4 --groupsize 32" ;;
    esac
    path=$CHECKPOINTS/$1/$file
    if [ ! -f "$path" ] && [ ! -f "$path.index.json" ]; then
        echo "error: $path: no such file; make it with" >&2
        echo "    scripts/prepare.sh $1" >&2
        if [ -n "$quantize" ]; then
            echo "    $PYTHON -m gpt_fast.quantize --checkpoint_path $CHECKPOINTS/$1/model.safetensors $quantize" >&2
        fi
        exit 1
    fi
    echo "$path"
}
