# Four slices of TPU v5e, with an image of the Containerfile: sh docs/examples/xpk.sh CLUSTER IMAGE
# A run that was interrupted ends with 75, and goes on from its last checkpoint in /runs, a storage of the cluster.
xpk workload create --cluster="$1" --workload=alexnet --docker-image="$2" --storage=runs \
  --tpu-type=v5litepod-16 --num-slices=4 --max-restarts=20 --restart-on-exit-codes=75 \
  --command="python train.py --config=configs/imagenet.py --config.data.data_dir=/runs/tfds --config.data.batch_size=1024 --workdir=/runs/imagenet"
