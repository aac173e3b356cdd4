# seed.sh SEED STAGE...   stages: sft-true sft-none sft-shuffled true unread none freed steady strained strained-steady
cd REPOSITORY; . WORK/venv/bin/activate; export PYTHONPATH=$PWD OMP_NUM_THREADS=1
S=WORK/study; seed=$1; shift
for st in "$@"; do
 case $st in
  sft-*) python train.py reason-sft --preset cpu --out $S/$st-$seed --seed $seed --reasoning.pictures 24 --sft.continued --sft.steps 1000 --sft.batch 48 --sft.pictures 20000 --sft.lr 5e-4 --sft.bf16 --sft.altered 0.5 --sft.related 0.4 --weights $S/base-2 --sft.rationales ${st#sft-} > WORK/$st-$seed.log 2>&1;;
  *) from=true; o=""
   case $st in unread) o="--grpo.no-reads";; none) from=none;; freed) from=base; o="--grpo.freed --grpo.no-reads";; steady) o="--grpo.no-adaptive";;
    strained) o="--grpo.beta 0 --grpo.lr 1e-3 --grpo.iterations 60 --grpo.text.bound 0.1 --grpo.text.lr 4e-3 --grpo.image.bound 0.1 --grpo.image.lr 4e-3";; strained-steady) o="--grpo.beta 0 --grpo.lr 1e-3 --grpo.iterations 60 --grpo.no-adaptive";; esac
   w=$S/sft-$from-$seed; [ $from = base ] && w=$S/base-2
   python train.py reason-grpo --preset cpu --out $S/grpo-$st-$seed --seed $seed --reasoning.pictures 24 $o --grpo.no-controls --weights $w > WORK/grpo-$st-$seed.log 2>&1;;
 esac
 echo "$(date +%T) $st-$seed rc $?" >> WORK/done.log
done
