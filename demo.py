"""dictionary_learning's command line: `python demo.py --save_dir saes --model_name ... --layers 3
--architectures ...` is `monosemy train ...`.

Run it with --help for every setting. Without the hub: python demo.py --save_dir saes --layers 3
--architectures top_k
"""

import sys

from monosemy.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
