"""What `gpt2-fast COMMAND --help` says under the options."""

EXIT_CODES = """\
exit codes:
  0    done
  1    failed; the last line on standard error says why
  2    the command line is wrong, or a value in it out of range
  130  stopped by Ctrl-C; text written so far stays
  141  whoever read the output closed it
"""

MAIN = """\
examples:
  gpt2-fast generate "Once upon a time" -n 100
  gpt2-fast generate "Once upon a time" --model gpt2 --temperature 0.8 --top-p 0.95
  echo "It was a truth universally acknowledged" | gpt2-fast score -
  gpt2-fast eval --task wikitext2 --model gpt2-large --data wiki.test.raw
  gpt2-fast quantize gpt2-xl -o gpt2-xl-int8
  gpt2-fast info --model gpt2-xl
  gpt2-fast doctor
  gpt2-fast bench --device cuda

"""

GENERATE = """\
The prompt is written before the text, except with --json. Results depend on the prompt, the
parameters, the seed, the weights and the precision: not on the number of samples, the threads or
the instruction set.

examples:
  gpt2-fast generate "Once upon a time" -n 100
  gpt2-fast generate "The answer is" --temperature 0 --stop . --model gpt2
  gpt2-fast generate "Dear Sir," --num 3 --seed 7 --top-p 0.95
  gpt2-fast generate "Dear Sir," --num 3 --json | jq -r .text
  gpt2-fast generate - < chapter.txt

"""

SCORE = """\
The first token has nothing before it and so no probability, unless --bos puts the end-of-text token
in front. Sum, bits per byte and perplexity are over the tokens that have one.

examples:
  gpt2-fast score "She was obliged to leave her."
  gpt2-fast score --bos --model gpt2 - < chapter.txt
  gpt2-fast score --json "To be, or not to be" | jq .perplexity

"""

EVAL = """\
Reads a file of the data set as it was published and writes the results, how they were measured, and
what others published for a model of this size. Data sets are not downloaded.

wikitext2  wiki.test.raw or wiki.test.tokens; perplexity per token and per word
lambada    JSON lines with a field "text", or a passage a line; how well last words are predicted

examples:
  gpt2-fast eval --task wikitext2 --model gpt2-large --data wiki.test.raw
  gpt2-fast eval --task wikitext2 --model gpt2-large --data wiki.test.raw --stride 512
  gpt2-fast eval --task lambada --model gpt2 --data lambada_test.jsonl --json

"""

QUANTIZE = """\
Writes a folder that loads as fast as it is read, on the CPU, in this precision: the weights as they
lie in memory, quantised and packed. Results are those of the model, bit for bit.

examples:
  gpt2-fast quantize gpt2-xl -o gpt2-xl-int8
  gpt2-fast quantize ./my-model --precision int4 -o ./my-model-int4
  gpt2-fast generate "Once upon a time" --model gpt2-xl-int8

"""

INFO = """\
Nothing is downloaded for a published name; any other name on the hub is, if it is not here yet.

examples:
  gpt2-fast info
  gpt2-fast info --model builtin
  gpt2-fast info --model gpt2-xl --json

"""

DOCTOR = """\
Every kernel runs on every instruction set of this machine, in every precision, and is compared with
numpy in float64; no torch is needed. Then memory is read as decoding reads weights, which says how
many tokens a second each published size can reach here at most. Exit code 1 if a kernel fails.

examples:
  gpt2-fast doctor
  GPT2_FAST_THREADS=1 gpt2-fast doctor --json

"""

BENCH = """\
Random weights in the shape of the model; nothing is downloaded for a published name. On CUDA, where
torch is installed: every op against float64, the time of each stage, and torch and transformers
measured in turns with ours.

examples:
  gpt2-fast bench --device cuda --out results
  gpt2-fast bench --device cuda --model 1558M --precision int8,int4 --batch 1
  gpt2-fast bench --device cpu --precision bf16 --batch 1 --position 32,896

"""
